#!/usr/bin/env python3
"""Install the project and its dependencies into .venv; called by `make` and `.ci/run`. Does nothing if .venv is up to date.

Environment variables. The first four are stored in the environment and apply to later calls that do not set them:
PYTHON        interpreter for the environment (default: the one that runs this, otherwise one on the PATH or from pyenv)
TORCH         version of torch, such as 2.4.1 (default: the one in constraints.txt)
TORCH_INDEX   package index for torch, such as that of PyTorch's CPU builds (default: pip's own)
FAIRSEQ       distribution that provides fairseq, such as ve-fairseq==0.12.3 (default: see default_fairseq)
VENV          folder of the environment (default: .venv)
pip's own variables (PIP_INDEX_URL, ...) apply as well. Needs only the standard library.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.abspath(os.path.join(ROOT, os.environ.get("VENV") or ".venv"))
STAMP = "installed"  # file in VENV: the choices it was made with, and the finished stages
CHOICES = ("PYTHON", "TORCH", "TORCH_INDEX", "FAIRSEQ")
SUPPORTED = ((3, 9), (3, 13))  # first and last, as in setup.py
OLDEST_TORCH = (2, 4)  # as in setup.py
FIRST_CHOICE = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.9")
STOCK = "fairseq==0.12.2"
LATER = ("fairseq-fixed==0.12.3.1", "ve-fairseq==0.12.3")  # for later Pythons, by preference; see docs/support.md
PROBE = """
import os, sys, sysconfig
base = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info[:2]))
if sys.prefix == sys.base_prefix or not os.path.exists(base):
    base = sys.executable  # a virtual environment may be removed later, so use its base interpreter if that exists
print(sys.version_info[0], sys.version_info[1])
print(os.path.realpath(base))
print(sysconfig.get_paths()["include"])
"""


class InstallError(Exception):
    """An error with a one-line message for the user."""


class Interpreter:
    """path of the base interpreter (links resolved), version (major, minor), include folder (of Python.h)."""

    def __init__(self, path, version, include):
        self.path, self.version, self.include = path, version, include


class Stage:
    """A step that runs once, and again if its commands or the contents of the files they depend on change.

    commands: lists of arguments for pip.
    """

    def __init__(self, name, what, commands, depends_on=()):
        self.name, self.what, self.commands = name, what, commands
        digest = hashlib.sha256(repr(commands).encode())
        for path in depends_on:
            with open(path, "rb") as file:
                digest.update(file.read())
        self.mark = digest.hexdigest()


def say(text):
    print("install: " + text, flush=True)


# Interpreters


def probe(python):
    """The Interpreter of a name or path; None if it cannot be run."""
    try:
        output = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version, path, include = output.decode().splitlines()[:3]
    return Interpreter(path, tuple(int(part) for part in version.split()), include)


def of_pyenv(name):
    """pyenv's interpreters of a name such as python3.10, newest first; pyenv's shims run only the selected one."""
    if os.path.sep in name or not re.match(r"python3\.\d+$", name):
        return []
    folder = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    return sorted(glob.glob(os.path.join(folder, "versions", "*", "bin", name)), reverse=True)


def choose_python():
    """The first suitable Interpreter. Raises InstallError if there is none."""
    wanted = os.environ.get("PYTHON")
    found = []
    for name in [wanted] if wanted else [sys.executable, *FIRST_CHOICE]:
        answer = next(filter(None, map(probe, [name, *of_pyenv(name)])), None)
        if answer and SUPPORTED[0] <= answer.version <= SUPPORTED[1]:
            return answer
        found.append("{} {}".format(name, "is Python {}.{}".format(*answer.version) if answer else "cannot be run"))
    raise InstallError(
        "Python {}.{} to {}.{} is needed, but {}; install one, or pass its path: make PYTHON=/path/to/python3.11".format(
            *SUPPORTED[0], *SUPPORTED[1], found[0]
        )
    )


def is_active():
    """Whether this runs from VENV or in a shell that has activated it. VENV must then not be removed."""
    places = (sys.prefix, os.environ.get("VIRTUAL_ENV") or sys.prefix)
    return os.path.realpath(VENV) in map(os.path.realpath, places)


# fairseq


def name_of(requirement):
    """The distribution name in a requirement."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def check_fairseq(requirement, version):
    """Raise InstallError if FAIRSEQ does not work on this Python."""
    known = [name_of(other) for other in (STOCK, *LATER)]
    if name_of(requirement) not in known:
        raise InstallError("FAIRSEQ={} is unknown; use one of {}, with a version".format(requirement, ", ".join(known)))
    if name_of(requirement) == "fairseq" and version >= (3, 11):
        raise InstallError(
            "FAIRSEQ={} does not import on Python {}.{}; use {}, or PYTHON=python3.10".format(requirement, *version, LATER[0])
        )


def check_torch(version):
    """Raise InstallError if TORCH is not a supported version."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST_TORCH <= (int(match.group(1)), int(match.group(2))) < (3, 0):
        raise InstallError(
            "TORCH={} is not a version from {}.{} up to 3; leave it out, or set one".format(version, *OLDEST_TORCH)
        )


def why_nothing_can_be_built(include):
    """What is missing to build fairseq's C++ extensions; empty if nothing is."""
    compilers = (os.environ.get("CXX", "").split() or ["c++"])[0], "g++", "clang++"
    if not any(shutil.which(name) for name in compilers):
        return "no C++ compiler was found; install g++ or clang++, or set CXX"
    if not os.path.isfile(os.path.join(include, "Python.h")):
        return "{} has no Python.h; install python3-dev or python3-devel".format(include)
    return ""


def has_wheel(requirement):
    """Whether the index has a wheel of the distribution for this Python and machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = pip_command("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def default_fairseq(interpreter):
    """The requirement to install if FAIRSEQ is not set.

    Python 3.9 and 3.10: fairseq itself. Later: fairseq-fixed. If nothing can be built here, the first that has a wheel.
    Raises InstallError if there is none.
    """
    candidates = [STOCK] if interpreter.version < (3, 11) else LATER
    reason = why_nothing_can_be_built(interpreter.include)
    if not reason:
        return candidates[0]
    for requirement in candidates:
        if has_wheel(requirement):
            return requirement
    raise InstallError("{} has no wheel for this machine, and {}".format(candidates[0], reason))


# Stages


def pip_command(*arguments):
    return [os.path.join(VENV, "bin", "python"), "-m", "pip", "--disable-pip-version-check", *arguments]


def pip(what, *arguments):
    """Run pip. Raises InstallError, naming what could not be installed."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # errors only
    if subprocess.call(pip_command(*arguments, *quiet), cwd=ROOT, pass_fds=LOCKED):
        raise InstallError(
            "installing {} failed (see above); if the package index cannot be reached, set PIP_INDEX_URL".format(what)
        )


def hasty():
    """pip options that make it fail within seconds, not minutes, if the index cannot be reached."""
    patient = os.environ.get("PIP_TIMEOUT") or os.environ.get("PIP_DEFAULT_TIMEOUT")
    return ["--retries", "1", *([] if patient else ["--timeout", "15"])]


def check_index():
    """Raise InstallError if the index cannot be reached, so that VENV is not removed without a replacement.

    Does nothing if VENV has no pip.
    """
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not os.path.exists(pip_command()[0]) or subprocess.call(pip_command("--version"), **silent):
        return
    with tempfile.TemporaryDirectory() as folder:
        command = pip_command("download", "--quiet", *hasty(), "--no-deps", "--dest", folder, "wheel")
        if subprocess.call(command, **silent):
            raise InstallError("the package index cannot be reached, so {} is kept; set PIP_INDEX_URL".format(VENV))


def first_stage(old_pip):
    """The Stage for build tools, which must precede all others."""
    # fairseq 0.12.2 needs an omegaconf whose metadata newer versions of pip refuse
    commands = [["install", *hasty(), "pip<24.1"]] if old_pip else []
    return Stage("tools", "setuptools and wheel", [*commands, ["install", *hasty(), "setuptools", "wheel"]])


def stages(choices, fairseq):
    """The Stages after the first, in order: torch before fairseq, because fairseq's build imports torch."""
    constraints = os.path.join(VENV, "constraints.txt")
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        text = file.read()
    with open(constraints, "w") as file:
        file.write("torch=={}\n".format(choices["TORCH"]) if choices.get("TORCH") else text)
    index = ["--index-url", choices["TORCH_INDEX"]] if choices.get("TORCH_INDEX") else []
    source = "from TORCH_INDEX={}".format(choices["TORCH_INDEX"]) if index else "(the largest download)"
    yield Stage("torch", "torch " + source, [["install", *index, "-c", constraints, "torch"]], [constraints])
    # stock fairseq's sdist lacks a file of the extension that it builds if torch is visible
    build = [] if name_of(fairseq) == "fairseq" else ["--no-build-isolation"]
    yield Stage(
        "fairseq",
        fairseq + " (takes some minutes the first time if it must be built)",
        [["install", "-c", constraints, "numpy", "cython"], ["install", *build, "-c", constraints, fairseq]],
        [constraints],
    )
    yield Stage(
        "project",
        "fairseq-sparsemixer and its test requirements",
        [["install", "--no-build-isolation", "-c", constraints, "--editable", ".[test]"]],
        [constraints, os.path.join(ROOT, "setup.py")],
    )


# The stamp


def read_stamp():
    """VENV's stamp: {"root", "choices", "fairseq", "stages": {name: mark}}; None if VENV does not exist or is empty.

    Raises InstallError if VENV was not made by this script.
    """
    if not os.path.isdir(VENV) or not os.listdir(VENV):
        return None
    not_ours = "{} was not made by this script and is left alone; move it away, or use another folder: make VENV=.venv-moe"
    not_ours = not_ours.format(VENV)
    try:
        with open(os.path.join(VENV, STAMP)) as file:
            text = file.read()
    except OSError:
        raise InstallError(not_ours)
    if re.match("[0-9a-f]{64}$", text):  # from an earlier version, which stored only a digest
        answer = probe(os.path.join(VENV, "bin", "python"))
        return {"root": ROOT, "choices": {"PYTHON": answer.path} if answer else {}, "stages": {"venv": "done"}}
    try:
        stamp = json.loads(text)
        stamp["choices"]["PYTHON"], stamp["stages"], stamp["root"]
    except (ValueError, KeyError, TypeError):
        raise InstallError(not_ours)
    return stamp


def write_stamp(stamp):
    """Write VENV's stamp atomically."""
    path = os.path.join(VENV, STAMP)
    with open(path + ".part", "w") as file:
        json.dump(stamp, file, indent=1)
    os.replace(path + ".part", path)


def given_choices():
    """The variables of CHOICES that are set, except PYTHON. Raises InstallError for an unsupported TORCH."""
    given = {name: os.environ[name] for name in CHOICES if name != "PYTHON" and os.environ.get(name)}
    if "TORCH" in given:
        check_torch(given["TORCH"])
    for requirement in (STOCK, *LATER):
        if given.get("FAIRSEQ") == name_of(requirement):
            given["FAIRSEQ"] = requirement
    return given


def differences(stamp, given):
    """Reasons to recreate the environment: (name, its value, the requested value) of each choice that differs.

    A choice can still change while its stage is not finished.
    """
    stage_of = {"TORCH": "torch", "TORCH_INDEX": "torch", "FAIRSEQ": "fairseq"}
    made_with = dict(stamp["choices"], FAIRSEQ=stamp.get("fairseq"))
    for name, value in sorted(given.items()):
        if name not in stage_of or stage_of[name] in stamp["stages"]:
            if made_with.get(name) != value:
                yield name, made_with.get(name) or "pip's choice", value
    if stamp["root"] != ROOT:
        yield "its folder", stamp["root"], ROOT
    if "venv" not in stamp["stages"]:
        yield "its creation", "interrupted", "a complete environment"
    elif not os.path.exists(os.path.join(VENV, "bin", "python")):
        yield "its interpreter", "removed", "a working one"


def empty_venv():
    """Remove everything in VENV except the stamp, which marks the environment as made by this script."""
    for name in os.listdir(VENV):
        path = os.path.join(VENV, name)
        if name == STAMP:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def create_venv(interpreter, given):
    """Create an environment without packages. Returns its stamp, which is written first, so that an interrupted one is known."""
    say("creating {} with {} (Python {}.{})".format(os.path.relpath(VENV, ROOT), interpreter.path, *interpreter.version))
    if not os.path.isdir(VENV):
        os.makedirs(VENV)
    stamp = {"root": ROOT, "choices": dict(given, PYTHON=interpreter.path), "stages": {}}
    write_stamp(stamp)
    empty_venv()
    if subprocess.call([interpreter.path, "-m", "venv", VENV], pass_fds=LOCKED):
        raise InstallError(
            "{} cannot create virtual environments; install its venv module (python3-venv)".format(interpreter.path)
        )
    stamp["stages"]["venv"] = "done"
    write_stamp(stamp)
    return stamp


# Installation

LOCKED = ()  # file descriptors inherited by child processes, so that they hold the lock if the installer is killed


@contextlib.contextmanager
def lock():
    """Allow one installation into this clone at a time; others wait."""
    global LOCKED
    if fcntl is None:
        yield
        return
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation in this clone to finish")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        LOCKED = (descriptor,)
        yield
    finally:
        LOCKED = ()
        os.close(descriptor)


def prepare(given):
    """The stamp of an environment that matches the choices: the existing one, or a new one."""
    stamp = read_stamp()
    interpreter = None
    if os.environ.get("PYTHON"):
        interpreter = choose_python()
        given = dict(given, PYTHON=interpreter.path)
    changes = list(differences(stamp, given)) if stamp else []
    if stamp and not changes:
        if not given.items() <= stamp["choices"].items():
            stamp["choices"].update(given)
            write_stamp(stamp)
        return stamp
    if changes and is_active():
        raise InstallError(
            "{} is active but must be recreated ({} was {}, requested: {}); deactivate it first".format(VENV, *changes[0])
        )
    if changes:
        kept = {name: value for name, value in stamp["choices"].items() if name != "PYTHON"}
        interpreter = interpreter or probe(stamp["choices"].get("PYTHON") or "") or choose_python()
        given = dict(kept, **given)
    interpreter = interpreter or choose_python()
    if "FAIRSEQ" in given:
        check_fairseq(given["FAIRSEQ"], interpreter.version)
    if changes:
        check_index()
        say("recreating {}: {} was {}, requested: {}".format(os.path.relpath(VENV, ROOT), *changes[0]))
    return create_venv(interpreter, given)


def resolve_fairseq(stamp):
    """The requirement to install: the requested one, otherwise the installed one, otherwise the default."""
    chosen, there = stamp["choices"].get("FAIRSEQ"), stamp.get("fairseq")
    if there and there == (chosen or there) and there in (STOCK, *LATER):
        return there
    interpreter = probe(os.path.join(VENV, "bin", "python"))
    if chosen:
        check_fairseq(chosen, interpreter.version)
    return chosen or default_fairseq(interpreter)


def run_stage(stage, stamp):
    """Run the stage unless it is done. Returns whether it ran."""
    if stamp["stages"].get(stage.name) == stage.mark:
        return False
    say("installing " + stage.what)
    for command in stage.commands:
        pip(stage.what, *command)
    stamp["stages"][stage.name] = stage.mark
    write_stamp(stamp)
    return True


def install():
    """Bring VENV up to date."""
    stamp = prepare(given_choices())
    if not stamp["choices"].get("TORCH_INDEX") and "torch" not in stamp["stages"]:
        if sys.platform == "linux" and not shutil.which("nvidia-smi"):
            say("no NVIDIA GPU found, but pip may download torch's GPU build of several GB; to avoid it, see README.md")
    old_pip = os.path.isdir(os.path.join(VENV, "lib", "python3.9")) or os.path.isdir(os.path.join(VENV, "lib", "python3.10"))
    changed = run_stage(first_stage(old_pip), stamp)
    stamp["fairseq"] = resolve_fairseq(stamp)
    for stage in stages(stamp["choices"], stamp["fairseq"]):
        changed = run_stage(stage, stamp) or changed
    if changed:
        say("done")


def interrupt(number, frame):
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    try:
        with lock():
            install()
    except InstallError as error:
        sys.exit("install: {}".format(error))
    except OSError as error:
        sys.exit("install: {} cannot be written ({})".format(error.filename or VENV, error.strerror))
    except KeyboardInterrupt:
        sys.exit("install: interrupted; rerun it to resume")
