"""The installation: what is kept, what is made anew, what is left alone, and what it says when it cannot go on. No pip is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import install

HERE = install.probe(sys.executable)
OTHER = install.Interpreter("/opt/other/bin/python3.12", (3, 12), "/include")


class Machine:
    """A clone with a .venv, on which installing is written down instead of done."""

    def __init__(self, root: Path):
        self.root, self.venv, self.made, self.pip = root, root / ".venv", [], []

    def create(self, interpreter, given):
        """Stands in for install.create_venv."""
        self.made.append(interpreter.path)
        (self.venv / "bin").mkdir(parents=True, exist_ok=True)
        (self.venv / "bin" / "python").touch()
        stamp = {"root": str(self.root), "choices": dict(given, PYTHON=interpreter.path), "stages": {"venv": "done"}}
        install.write_stamp(stamp)
        return stamp

    def stamp(self):
        return json.loads((self.venv / install.STAMP).read_text())

    def packages(self):
        """The last argument of each pip, since the last time, and then forgotten."""
        last, self.pip[:] = [arguments[-1] for arguments in self.pip], []
        return last


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine(tmp_path)
    for name in ("setup.py", "constraints.txt"):
        (tmp_path / name).write_text("")
    for name in (*install.CHOICES, "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(install, "ROOT", str(machine.root))
    monkeypatch.setattr(install, "VENV", str(machine.venv))
    monkeypatch.setattr(install, "create_venv", machine.create)
    monkeypatch.setattr(install, "check_index", lambda: None)
    monkeypatch.setattr(install, "pip", lambda what, *arguments: machine.pip.append(arguments))
    monkeypatch.setattr(install, "probe", lambda name: OTHER if "other" in name else HERE)
    monkeypatch.setattr(install, "why_nothing_can_be_built", lambda include: "")
    return machine


ALL = ["wheel", "torch", "cython", install.LATER[0] if HERE.version >= (3, 11) else install.STOCK, ".[test]"]


def test_the_second_call_does_nothing(machine):
    install.install()
    assert machine.packages()[-5:] == ALL and len(machine.made) == 1
    install.install()
    assert machine.packages() == [] and len(machine.made) == 1


@pytest.mark.parametrize("name, value", [("TORCH_INDEX", "https://example.org/cpu"), ("PYTHON", "other"), ("TORCH", "2.4.1")])
def test_a_choice_holds_for_calls_that_do_not_name_it(machine, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    install.install()
    made = machine.stamp()
    monkeypatch.delenv(name)
    machine.packages()
    install.install()
    assert machine.packages() == [] and len(machine.made) == 1 and machine.stamp() == made


@pytest.mark.parametrize("name, value", [
    ("TORCH_INDEX", "https://example.org/cpu"), ("PYTHON", "other"), ("TORCH", "2.4.1"), ("FAIRSEQ", "ve-fairseq"),
])  # fmt: skip
def test_another_choice_makes_the_environment_anew(machine, monkeypatch, name, value):
    install.install()
    machine.packages()
    monkeypatch.setenv(name, value)
    install.install()
    assert len(machine.made) == 2 and "torch" in machine.packages()


def test_a_choice_that_makes_it_anew_keeps_the_others(machine, monkeypatch):
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install.install()
    monkeypatch.delenv("TORCH_INDEX")
    monkeypatch.setenv("PYTHON", "other")
    install.install()
    assert machine.stamp()["choices"] == {"TORCH_INDEX": "https://example.org/cpu", "PYTHON": OTHER.path}


def test_the_same_choices_again_change_nothing(machine, monkeypatch):
    monkeypatch.setenv("PYTHON", "other")
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install.install()
    install.install()
    assert len(machine.made) == 1


def test_new_requirements_are_installed_into_what_is_there(machine):
    install.install()
    machine.packages()
    (machine.root / "setup.py").write_text("# another version")
    install.install()
    assert machine.packages() == [".[test]"] and len(machine.made) == 1


def test_new_constraints_concern_torch_too(machine):
    install.install()
    machine.packages()
    (machine.root / "constraints.txt").write_text("torch==2.12.0")
    install.install()
    assert machine.packages() == ALL[1:] and len(machine.made) == 1


def test_an_interrupted_installation_goes_on_after_what_is_done(machine, monkeypatch):
    def cut_short(what, *arguments):
        if arguments[-1] == ALL[3]:
            raise KeyboardInterrupt

    whole = install.pip
    monkeypatch.setattr(install, "pip", cut_short)
    with pytest.raises(KeyboardInterrupt):
        install.install()
    monkeypatch.setattr(install, "pip", whole)
    install.install()
    assert machine.packages() == ALL[2:] and len(machine.made) == 1  # torch is not fetched again


def test_an_index_named_after_an_interruption_needs_no_new_environment(machine, monkeypatch):
    def cut_short(what, *arguments):
        if arguments[-1] == "torch":
            raise KeyboardInterrupt

    whole = install.pip
    monkeypatch.setattr(install, "pip", cut_short)
    with pytest.raises(KeyboardInterrupt):
        install.install()
    monkeypatch.setattr(install, "pip", whole)
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install.install()
    assert len(machine.made) == 1
    assert any("https://example.org/cpu" in arguments for arguments in machine.pip)


@pytest.mark.parametrize("how", ["prefix", "VIRTUAL_ENV"])
def test_the_environment_one_works_in_is_never_removed(machine, monkeypatch, how):
    install.install()
    if how == "prefix":
        monkeypatch.setattr(install.sys, "prefix", str(machine.venv))
    else:
        monkeypatch.setenv("VIRTUAL_ENV", str(machine.venv))
    install.install()  # up to date: nothing to do
    monkeypatch.setenv("PYTHON", "other")
    with pytest.raises(install.InstallError, match="is active, and has to be made anew .* deactivate it first"):
        install.install()
    assert len(machine.made) == 1


def test_a_virtual_environments_python_stands_for_the_one_it_was_made_from(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    inside = install.probe(str(tmp_path / "env" / "bin" / "python"))
    assert inside.path == HERE.path and not inside.path.startswith(str(tmp_path))


@pytest.mark.parametrize("content", [None, "", "not ours", '{"name": "another tool\'s"}', "[]"])
def test_an_environment_of_another_origin_is_left_alone(machine, content):
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").write_text("years of work")
    if content is not None:
        (machine.venv / install.STAMP).write_text(content)
    with pytest.raises(install.InstallError, match="was not made by this script and is left alone; move it away"):
        install.install()
    assert (machine.venv / "thesis.txt").read_text() == "years of work" and not machine.made


def test_an_environment_that_a_digest_was_kept_of_is_taken_over(machine):
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").touch()
    (machine.venv / install.STAMP).write_text("0" * 64)
    install.install()
    assert machine.made == [] and machine.packages()[-5:] == ALL


@pytest.mark.parametrize("harm", ["moved", "no interpreter", "cut short"])
def test_what_cannot_run_is_made_anew(machine, harm):
    install.install()
    stamp = machine.stamp()
    if harm == "moved":
        stamp["root"] = "/elsewhere"
    elif harm == "cut short":
        stamp["stages"] = {}
    else:
        (machine.venv / "bin" / "python").unlink()
    install.write_stamp(stamp)
    install.install()
    assert len(machine.made) == 2


def test_without_an_index_nothing_is_removed(machine, monkeypatch):
    def unreachable():
        raise install.InstallError("no index")

    install.install()
    monkeypatch.setattr(install, "check_index", unreachable)
    monkeypatch.setenv("PYTHON", "other")
    with pytest.raises(install.InstallError, match="no index"):
        install.install()
    assert len(machine.made) == 1


def test_emptying_keeps_the_stamp_and_does_not_follow_links(monkeypatch, tmp_path):
    venv, outside = tmp_path / ".venv", tmp_path / "data"
    (venv / "lib" / "package").mkdir(parents=True)
    outside.mkdir()
    (outside / "thesis.txt").write_text("years of work")
    (venv / "link").symlink_to(outside)
    (venv / install.STAMP).write_text("{}")
    (venv / "pyvenv.cfg").write_text("")
    monkeypatch.setattr(install, "VENV", str(venv))
    install.empty_venv()
    assert os.listdir(venv) == [install.STAMP] and (outside / "thesis.txt").exists()


def test_two_installations_wait_for_each_other(monkeypatch, tmp_path):
    if install.fcntl is None:
        pytest.skip("file locks need fcntl")
    monkeypatch.setattr(install, "ROOT", str(tmp_path))
    attempt = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", attempt, str(tmp_path)]
    with install.lock():
        assert b"BlockingIOError" in subprocess.run(command, stderr=subprocess.PIPE).stderr
    assert subprocess.run(command).returncode == 0


# What cannot be installed


@pytest.mark.parametrize("version", [(3, 8), (3, 14)])
def test_a_python_that_will_not_do_is_named_with_the_remedy(monkeypatch, version):
    monkeypatch.setattr(install, "probe", lambda python: install.Interpreter(python, version, "/include"))
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")
    sentence = r"3.9 to 3.13 is needed and /usr/bin/python3 is Python {}.{}; .* make PYTHON=".format(*version)
    with pytest.raises(install.InstallError, match=sentence):
        install.choose_python()
    monkeypatch.setattr(install, "probe", lambda python: None)
    with pytest.raises(install.InstallError, match="/usr/bin/python3 cannot be run"):
        install.choose_python()


def test_another_python_is_looked_for_when_the_one_at_hand_will_not_do(monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    versions = {"python3.12": (3, 12)}
    monkeypatch.setattr(
        install, "probe", lambda python: install.Interpreter(python, versions.get(os.path.basename(python), (3, 14)), "/include")
    )
    assert install.choose_python().path == "python3.12"


def test_an_interpreter_that_pyenv_has_and_did_not_select_is_found(monkeypatch, tmp_path):
    for version in ("3.10.4", "3.9.18"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python{}".format(version.rpartition(".")[0])).touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHON", "python3.10")
    there = lambda name: install.Interpreter(name, (3, 10), "") if str(tmp_path) in name else None  # noqa: E731
    monkeypatch.setattr(install, "probe", there)
    assert install.choose_python().path == str(tmp_path / "versions" / "3.10.4" / "bin" / "python3.10")


@pytest.mark.parametrize("requirement, version, sentence", [
    ("fairseq-light==0.1", (3, 11), "FAIRSEQ=fairseq-light==0.1 is none of fairseq, fairseq-fixed, ve-fairseq"),
    ("fairseq==0.12.2", (3, 11), "does not import on Python 3.11; use fairseq-fixed==0.12.3.1, or PYTHON=python3.10"),
])  # fmt: skip
def test_a_fairseq_that_cannot_work_is_refused(requirement, version, sentence):
    with pytest.raises(install.InstallError, match=sentence):
        install.check_fairseq(requirement, version)


def test_a_refused_choice_removes_nothing(machine, monkeypatch):
    install.install()
    monkeypatch.setenv("FAIRSEQ", "fairseq-light")
    with pytest.raises(install.InstallError, match="none of fairseq"):
        install.install()
    assert len(machine.made) == 1


@pytest.mark.parametrize("version", ["1.13.1", "2.3", "3.0", "newest"])
def test_a_torch_that_will_not_do_is_refused(monkeypatch, version):
    monkeypatch.setenv("TORCH", version)
    with pytest.raises(install.InstallError, match="TORCH={} is not a version from 2.4 up to 3".format(version)):
        install.given_choices()


@pytest.mark.parametrize("version, requirement", [((3, 9), "fairseq"), ((3, 10), "fairseq"), ((3, 11), "fairseq-fixed")])
def test_stock_fairseq_is_for_pythons_that_import_it(monkeypatch, version, requirement):
    monkeypatch.setattr(install, "why_nothing_can_be_built", lambda include: "")
    monkeypatch.setattr(install, "has_wheel", lambda requirement: False)
    assert install.name_of(install.default_fairseq(install.Interpreter("python", version, "/include"))) == requirement


def test_where_nothing_can_be_built_what_comes_built_is_taken(monkeypatch):
    monkeypatch.setattr(install, "why_nothing_can_be_built", lambda include: "no C++ compiler was found; install g++")
    monkeypatch.setattr(install, "has_wheel", lambda requirement: requirement.startswith("ve-"))
    assert install.default_fairseq(install.Interpreter("python", (3, 11), "")).startswith("ve-fairseq==")
    with pytest.raises(install.InstallError, match="fairseq==0.12.2 is not to be had built .* install g"):
        install.default_fairseq(install.Interpreter("python", (3, 10), ""))


def test_stock_fairseq_is_built_apart_from_torch_and_the_others_beside_it(machine):
    machine.venv.mkdir()

    def isolated(requirement):
        build = next(stage for stage in install.stages({}, requirement) if stage.name == "fairseq")
        return "--no-build-isolation" not in build.commands[-1]

    assert isolated(install.STOCK) and not any(map(isolated, install.LATER))


def test_a_missing_compiler_or_header_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    assert "no C++ compiler" in install.why_nothing_can_be_built(str(tmp_path))
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/" + name)
    assert "has no Python.h" in install.why_nothing_can_be_built(str(tmp_path))
    (tmp_path / "Python.h").touch()
    assert not install.why_nothing_can_be_built(str(tmp_path))


def test_a_failing_pip_is_reported_with_what_it_was_to_install(monkeypatch):
    monkeypatch.setattr(install.subprocess, "call", lambda *args, **kwargs: 1)
    with pytest.raises(install.InstallError, match="installing torch failed .* PIP_INDEX_URL"):
        install.pip("torch", "install", "torch")


def test_the_range_of_pythons_is_that_of_the_package():
    text = (Path(install.__file__).parent.parent / "setup.py").read_text()
    (first, last), oldest = install.SUPPORTED, install.OLDEST_TORCH
    assert 'python_requires=">={}.{},<{}.{}"'.format(*first, last[0], last[1] + 1) in text
    assert "torch>={}.{},<3".format(*oldest) in text
    assert all(requirement in text for requirement in (install.STOCK, install.LATER[0]))
