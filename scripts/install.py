#!/usr/bin/env python3
"""Install the project and all it needs into .venv: what `make` and `.ci/run` call. Does nothing when it is up to date.

Environment variables. The first four are kept in the environment made, and hold for later calls that do not give them:
PYTHON        interpreter to build on (default: the one that runs this, else one on the PATH or of pyenv)
TORCH         version of torch, such as 2.4.1 (default: the one in constraints.txt)
TORCH_INDEX   package index to take torch from, such as that of PyTorch's CPU builds (default: pip's own)
FAIRSEQ       distribution that provides fairseq, such as ve-fairseq==0.12.3 (default: see default_fairseq)
VENV          folder of the environment (default: .venv)
pip's own (PIP_INDEX_URL, ...) apply. Needs the standard library alone.
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
STAMP = "installed"  # in VENV: what it was made with, and which stages are done
CHOICES = ("PYTHON", "TORCH", "TORCH_INDEX", "FAIRSEQ")
SUPPORTED = ((3, 9), (3, 13))  # first and last, as in setup.py
OLDEST_TORCH = (2, 4)  # as in setup.py
FIRST_CHOICE = ("python3.11", "python3.12", "python3.13", "python3.10", "python3.9")
STOCK = "fairseq==0.12.2"
LATER = ("fairseq-fixed==0.12.3.1", "ve-fairseq==0.12.3")  # by preference; docs/support.md says why
PROBE = """
import os, sys, sysconfig
base = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info[:2]))
if sys.prefix == sys.base_prefix or not os.path.exists(base):
    base = sys.executable  # in a virtual environment, the one it was made from: that environment may go
print(sys.version_info[0], sys.version_info[1])
print(os.path.realpath(base))
print(sysconfig.get_paths()["include"])
"""


class InstallError(Exception):
    """One sentence for the user."""


class Interpreter:
    """path (of the base interpreter, links resolved), version (major, minor), include (the folder of Python.h)."""

    def __init__(self, path, version, include):
        self.path, self.version, self.include = path, version, include


class Stage:
    """A step that is done once, and again when its commands, or the contents of files they depend on, change.

    commands: lists of arguments of pip.
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
    """The Interpreter behind a name or path; None when it cannot be run."""
    try:
        output = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version, path, include = output.decode().splitlines()[:3]
    return Interpreter(path, tuple(int(part) for part in version.split()), include)


def of_pyenv(name):
    """The interpreters of a name such as python3.10 that pyenv has, newest first; its shims run the selected one alone."""
    if os.path.sep in name or not re.match(r"python3\.\d+$", name):
        return []
    folder = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    return sorted(glob.glob(os.path.join(folder, "versions", "*", "bin", name)), reverse=True)


def choose_python():
    """The first Interpreter that will do. Raises InstallError when none will."""
    wanted = os.environ.get("PYTHON")
    found = []
    for name in [wanted] if wanted else [sys.executable, *FIRST_CHOICE]:
        answer = next(filter(None, map(probe, [name, *of_pyenv(name)])), None)
        if answer and SUPPORTED[0] <= answer.version <= SUPPORTED[1]:
            return answer
        found.append("{} {}".format(name, "is Python {}.{}".format(*answer.version) if answer else "cannot be run"))
    raise InstallError(
        "Python {}.{} to {}.{} is needed and {}; install one, or name it: make PYTHON=/path/to/python3.11".format(
            *SUPPORTED[0], *SUPPORTED[1], found[0]
        )
    )


def is_active():
    """Whether this runs from VENV, or in a shell that has it activated: what must not be removed then."""
    places = (sys.prefix, os.environ.get("VIRTUAL_ENV") or sys.prefix)
    return os.path.realpath(VENV) in map(os.path.realpath, places)


# fairseq


def name_of(requirement):
    """The distribution's name in a requirement."""
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def check_fairseq(requirement, version):
    """Raises InstallError unless FAIRSEQ can work on this Python."""
    known = [name_of(other) for other in (STOCK, *LATER)]
    if name_of(requirement) not in known:
        raise InstallError("FAIRSEQ={} is none of {}; use one of these, with a version".format(requirement, ", ".join(known)))
    if name_of(requirement) == "fairseq" and version >= (3, 11):
        raise InstallError(
            "FAIRSEQ={} does not import on Python {}.{}; use {}, or PYTHON=python3.10".format(requirement, *version, LATER[0])
        )


def check_torch(version):
    """Raises InstallError unless TORCH is a version that the project works with."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if not match or not OLDEST_TORCH <= (int(match.group(1)), int(match.group(2))) < (3, 0):
        raise InstallError(
            "TORCH={} is not a version from {}.{} up to 3; leave it out, or give one".format(version, *OLDEST_TORCH)
        )


def why_nothing_can_be_built(include):
    """What is missing to build fairseq's C++ extensions; empty when nothing is."""
    compilers = (os.environ.get("CXX", "").split() or ["c++"])[0], "g++", "clang++"
    if not any(shutil.which(name) for name in compilers):
        return "no C++ compiler was found; install g++ or clang++, or set CXX"
    if not os.path.isfile(os.path.join(include, "Python.h")):
        return "{} has no Python.h; install python3-dev or python3-devel".format(include)
    return ""


def has_wheel(requirement):
    """Whether the index has the distribution built for this Python and machine."""
    with tempfile.TemporaryDirectory() as folder:
        command = pip_command("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def default_fairseq(interpreter):
    """The requirement that a call without FAIRSEQ installs.

    Python 3.9 and 3.10: fairseq itself. Later: fairseq-fixed. Where nothing can be built, the first that comes built.
    Raises InstallError when there is none.
    """
    candidates = [STOCK] if interpreter.version < (3, 11) else LATER
    reason = why_nothing_can_be_built(interpreter.include)
    if not reason:
        return candidates[0]
    for requirement in candidates:
        if has_wheel(requirement):
            return requirement
    raise InstallError("{} is not to be had built for this machine, and {}".format(candidates[0], reason))


# Stages


def pip_command(*arguments):
    return [os.path.join(VENV, "bin", "python"), "-m", "pip", "--disable-pip-version-check", *arguments]


def pip(what, *arguments):
    """Run pip. Raises InstallError, saying what could not be installed."""
    quiet = [] if sys.stdout.isatty() else ["-qq"]  # errors alone
    if subprocess.call(pip_command(*arguments, *quiet), cwd=ROOT, pass_fds=LOCKED):
        raise InstallError(
            "installing {} failed (see above); if no package index can be reached, set PIP_INDEX_URL to one".format(what)
        )


def hasty():
    """Options of pip with which it says within seconds, and not after minutes, that no index can be reached."""
    patient = os.environ.get("PIP_TIMEOUT") or os.environ.get("PIP_DEFAULT_TIMEOUT")
    return ["--retries", "1", *([] if patient else ["--timeout", "15"])]


def check_index():
    """Raises InstallError where VENV could be removed and not be filled again. Nothing is said where it has no pip."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not os.path.exists(pip_command()[0]) or subprocess.call(pip_command("--version"), **silent):
        return
    with tempfile.TemporaryDirectory() as folder:
        command = pip_command("download", "--quiet", *hasty(), "--no-deps", "--dest", folder, "wheel")
        if subprocess.call(command, **silent):
            raise InstallError("no package index can be reached, and {} is kept; set PIP_INDEX_URL to one".format(VENV))


def first_stage(old_pip):
    """What is small, before the rest."""
    # fairseq 0.12.2 needs an omegaconf whose metadata newer versions of pip refuse
    commands = [["install", *hasty(), "pip<24.1"]] if old_pip else []
    return Stage("tools", "setuptools and wheel", [*commands, ["install", *hasty(), "setuptools", "wheel"]])


def stages(choices, fairseq):
    """The Stages after the first, in order: torch before fairseq, whose build needs to see it."""
    constraints = os.path.join(VENV, "constraints.txt")
    with open(os.path.join(ROOT, "constraints.txt")) as file:
        text = file.read()
    with open(constraints, "w") as file:
        file.write("torch=={}\n".format(choices["TORCH"]) if choices.get("TORCH") else text)
    index = ["--index-url", choices["TORCH_INDEX"]] if choices.get("TORCH_INDEX") else []
    source = "from TORCH_INDEX={}".format(choices["TORCH_INDEX"]) if index else "(the largest download)"
    yield Stage("torch", "torch " + source, [["install", *index, "-c", constraints, "torch"]], [constraints])
    # stock fairseq's sdist lacks a file of the extension that it builds where it sees torch
    build = [] if name_of(fairseq) == "fairseq" else ["--no-build-isolation"]
    yield Stage(
        "fairseq",
        fairseq + " (where it has to be built, some minutes the first time)",
        [["install", "-c", constraints, "numpy", "cython"], ["install", *build, "-c", constraints, fairseq]],
        [constraints],
    )
    yield Stage(
        "project",
        "fairseq-sparsemixer and what its tests need",
        [["install", "--no-build-isolation", "-c", constraints, "--editable", ".[test]"]],
        [constraints, os.path.join(ROOT, "setup.py")],
    )


# The stamp


def read_stamp():
    """What is known of VENV: {"root", "choices", "fairseq", "stages": {name: mark}}. None: it is not there, or empty.

    Raises InstallError when it was made by something else.
    """
    if not os.path.isdir(VENV) or not os.listdir(VENV):
        return None
    not_ours = "{} was not made by this script and is left alone; move it away, or name another folder: make VENV=.venv-moe"
    not_ours = not_ours.format(VENV)
    try:
        with open(os.path.join(VENV, STAMP)) as file:
            text = file.read()
    except OSError:
        raise InstallError(not_ours)
    if re.match("[0-9a-f]{64}$", text):  # of an earlier version, which kept a digest alone
        answer = probe(os.path.join(VENV, "bin", "python"))
        return {"root": ROOT, "choices": {"PYTHON": answer.path} if answer else {}, "stages": {"venv": "done"}}
    try:
        stamp = json.loads(text)
        stamp["choices"]["PYTHON"], stamp["stages"], stamp["root"]
    except (ValueError, KeyError, TypeError):
        raise InstallError(not_ours)
    return stamp


def write_stamp(stamp):
    """Whole or not at all."""
    path = os.path.join(VENV, STAMP)
    with open(path + ".part", "w") as file:
        json.dump(stamp, file, indent=1)
    os.replace(path + ".part", path)


def given_choices():
    """The variables of CHOICES that are set, checked, but for PYTHON."""
    given = {name: os.environ[name] for name in CHOICES if name != "PYTHON" and os.environ.get(name)}
    if "TORCH" in given:
        check_torch(given["TORCH"])
    for requirement in (STOCK, *LATER):
        if given.get("FAIRSEQ") == name_of(requirement):
            given["FAIRSEQ"] = requirement
    return given


def differences(stamp, given):
    """Why an environment has to be made anew: (name, its value, the value asked for) of each choice that differs.

    A choice whose stage has not been done can still be made.
    """
    stage_of = {"TORCH": "torch", "TORCH_INDEX": "torch", "FAIRSEQ": "fairseq"}
    made_with = dict(stamp["choices"], FAIRSEQ=stamp.get("fairseq"))
    for name, value in sorted(given.items()):
        if name not in stage_of or stage_of[name] in stamp["stages"]:
            if made_with.get(name) != value:
                yield name, made_with.get(name) or "pip's choice", value
    if stamp["root"] != ROOT:
        yield "folder", stamp["root"], ROOT
    if "venv" not in stamp["stages"]:
        yield "its making", "cut short", "a whole one"
    elif not os.path.exists(os.path.join(VENV, "bin", "python")):
        yield "its interpreter", "removed", "one that runs"


def empty_venv():
    """Remove all that VENV holds but the stamp, which says that the rest is ours to remove."""
    for name in os.listdir(VENV):
        path = os.path.join(VENV, name)
        if name == STAMP:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def create_venv(interpreter, given):
    """An environment without packages; its stamp. The stamp is there before all else: what is cut short is known as ours."""
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


# All of it

LOCKED = ()  # file descriptors that children keep open, so that the lock outlives an installer that is killed


@contextlib.contextmanager
def lock():
    """One installation into this clone at a time; the next one waits."""
    global LOCKED
    if fcntl is None:
        yield
        return
    descriptor = os.open(ROOT, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation into this clone to end")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        LOCKED = (descriptor,)
        yield
    finally:
        LOCKED = ()
        os.close(descriptor)


def prepare(given):
    """The stamp of an environment that fits the choices: the one there is, or a new one."""
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
            "{} is active, and has to be made anew ({} was {}, and {} is asked for); deactivate it first".format(
                VENV, *changes[0]
            )
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
        say("making {} anew: {} was {}, and {} is asked for".format(os.path.relpath(VENV, ROOT), *changes[0]))
    return create_venv(interpreter, given)


def resolve_fairseq(stamp):
    """The requirement to install: the one asked for, else the one that is there, else the default."""
    chosen, there = stamp["choices"].get("FAIRSEQ"), stamp.get("fairseq")
    if there and there == (chosen or there) and there in (STOCK, *LATER):
        return there
    interpreter = probe(os.path.join(VENV, "bin", "python"))
    if chosen:
        check_fairseq(chosen, interpreter.version)
    return chosen or default_fairseq(interpreter)


def run_stage(stage, stamp):
    """Do it, unless it is done."""
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
            say("no NVIDIA GPU seen, and pip may choose torch's build for GPUs, several GB; README.md names the remedy")
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
        sys.exit("install: interrupted; the next call goes on from here")
