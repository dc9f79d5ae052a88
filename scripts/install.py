#!/usr/bin/env python3
"""Install the project and all it needs into .venv: what `make` and `.ci/run` call. Does nothing when it is up to date.

Environment: PYTHON, the interpreter to build on (default: the one that runs this, else one on the PATH). TORCH_INDEX, a package
index to take torch from, such as that of PyTorch's CPU builds (default: pip's own). pip's variables (PIP_INDEX_URL, ...) apply.
Needs the standard library alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
BIN = os.path.join(VENV, "bin")
STAMP = os.path.join(VENV, "installed")
CONSTRAINTS = os.path.join(ROOT, "constraints.txt")
SUPPORTED = ((3, 8), (3, 12))  # first and last
FIRST_CHOICE = ("python3.11", "python3.12", "python3.10", "python3.9", "python3.8")
PROBE = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_paths()['include'])"


class InstallError(Exception):
    """One sentence for the user."""


def probe(python):
    """(version, include folder) of an interpreter; None when it cannot be run."""
    try:
        output = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    major, minor, include = output.decode().strip().split(" ", 2)
    return (int(major), int(minor)), include


def choose_python():
    """(interpreter, version, include folder). Raises InstallError when none will do."""
    wanted = os.environ.get("PYTHON")
    names = [wanted] if wanted else [sys.executable, *FIRST_CHOICE]
    found = []
    for name in names:
        answer = probe(name)
        if answer and SUPPORTED[0] <= answer[0] <= SUPPORTED[1]:
            return (name, *answer)
        found.append("{} {}".format(name, "is Python {}.{}".format(*answer[0]) if answer else "cannot be run"))
    raise InstallError(
        "Python {}.{} to {}.{} is needed and {}; install one, or name it: make PYTHON=/path/to/python3.11".format(
            *SUPPORTED[0], *SUPPORTED[1], ", ".join(found if wanted else found[:1])
        )
    )


def check_compiler(include):
    """Raises InstallError unless fairseq's C++ extensions can be built."""
    compilers = (os.environ.get("CXX", "").split() or ["c++"])[0], "g++", "clang++"
    if not any(shutil.which(name) for name in compilers):
        raise InstallError("no C++ compiler was found, and fairseq builds extensions; install g++ or clang++, or set CXX")
    if not os.path.isfile(os.path.join(include, "Python.h")):
        raise InstallError(
            "{} has no Python.h, and fairseq builds extensions; install python3-dev or python3-devel".format(include)
        )


def fingerprint(python, version):
    """Changes when anything does that the installed environment depends on."""
    digest = hashlib.sha256(repr((ROOT, python, version, os.environ.get("TORCH_INDEX"))).encode())
    for path in (os.path.join(ROOT, "setup.py"), CONSTRAINTS, os.path.abspath(__file__)):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def say(text):
    print("install: " + text, flush=True)


def pip(what, *arguments):
    """Run pip install. Raises InstallError, saying what could not be installed."""
    say("installing " + what)
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    command = [os.path.join(BIN, "python"), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments]
    if subprocess.call(command, cwd=ROOT):
        raise InstallError(
            "installing {} failed (see above); if no package index can be reached, set PIP_INDEX_URL to one".format(what)
        )


def install(python, version):
    """Make .venv anew and fill it: torch first, since fairseq's build needs to see it."""
    say("creating .venv with {} (Python {}.{})".format(python, *version))
    if subprocess.call([python, "-m", "venv", "--clear", VENV]):
        raise InstallError("{} cannot create virtual environments; install its venv module (python3-venv)".format(python))
    index = os.environ.get("TORCH_INDEX")
    if not index and sys.platform == "linux" and not shutil.which("nvidia-smi"):
        say("no NVIDIA GPU seen, and pip may choose torch's build for GPUs, several GB; README.md names the remedy")
    if version < (3, 11):  # fairseq 0.12.2 needs an omegaconf whose metadata newer versions of pip refuse
        pip("an older pip, for fairseq 0.12.2", "pip<24.1")
    pip("torch (the largest download)", *(["--index-url", index] if index else []), "-c", CONSTRAINTS, "torch")
    pip("numpy, cython, setuptools and wheel", "-c", CONSTRAINTS, "numpy", "cython", "setuptools", "wheel")
    pip(
        "fairseq (built here, some minutes the first time), fairseq-sparsemixer and what its tests need",
        *("--no-build-isolation", "-c", CONSTRAINTS, "--editable", ".[test]"),
    )


def main():
    python, version, include = choose_python()
    mark = fingerprint(python, version)
    if os.path.isfile(STAMP):
        with open(STAMP) as file:
            if file.read() == mark:
                return
    check_compiler(include)
    install(python, version)
    with open(STAMP, "w") as file:
        file.write(mark)
    say("done")


if __name__ == "__main__":
    try:
        main()
    except InstallError as error:
        sys.exit("install: {}".format(error))
    except KeyboardInterrupt:
        sys.exit("install: interrupted; the next call starts over")
