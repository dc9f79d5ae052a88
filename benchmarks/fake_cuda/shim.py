"""Build and load shim.cpp, which makes a CPU build of torch report one GPU. Imports no torch: see load."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import List, Optional

HERE = Path(__file__).parent


def torch_folder() -> Path:
    """The folder where torch is installed, found without importing it."""
    return Path(importlib.util.find_spec("torch").origin).parent


def why_not() -> Optional[str]:
    """The reason why the shim cannot work here; None if it can."""
    if shutil.which("g++") is None:
        return "no C++ compiler"
    if "+cpu" not in (torch_folder() / "version.py").read_text(encoding="utf-8"):
        return "torch is not a CPU build; a CUDA build has its own hooks"
    return None


def build(folder: Path) -> Path:
    """Compile the shim for the installed torch. Returns the library's path. Raises CalledProcessError."""
    torch, library = torch_folder(), folder / "libfakecuda.so"
    include, lib = torch / "include", torch / "lib"
    includes = [f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}"]
    linked = [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", *includes, str(HERE / "shim.cpp"), "-o", str(library), *linked]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def load(library: str) -> None:
    """Load the shim. Must run before torch is imported, because torch asks for its hooks only once."""
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def command(library: Path, module: str, *arguments: str) -> List[str]:
    """The command that runs a module in a process with the shim loaded; the repository's root must be on its path."""
    return [sys.executable, "-m", "benchmarks.fake_cuda", str(library), module, *arguments]
