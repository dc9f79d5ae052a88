"""The installer: what it keeps, recreates and leaves alone, and its error messages. The tests do not run pip."""

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
    """A clone with a .venv, which records installations instead of running them."""

    def __init__(self, root: Path):
        self.root, self.venv, self.made, self.pip = root, root / ".venv", [], []

    def create(self, interpreter, given):
        """Replaces install.create_venv."""
        self.made.append(interpreter.path)
        (self.venv / "bin").mkdir(parents=True, exist_ok=True)
        (self.venv / "bin" / "python").touch()
        stamp = {"root": str(self.root), "choices": dict(given, PYTHON=interpreter.path), "stages": {"venv": "done"}}
        install.write_stamp(stamp)
        return stamp

    def stamp(self):
        return json.loads((self.venv / install.STAMP).read_text())

    def packages(self):
        """The last argument of each pip call since the last call of this function."""
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
def test_a_choice_applies_to_later_calls_that_do_not_set_it(machine, monkeypatch, name, value):
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
def test_a_changed_choice_recreates_the_environment(machine, monkeypatch, name, value):
    install.install()
    machine.packages()
    monkeypatch.setenv(name, value)
    install.install()
    assert len(machine.made) == 2 and "torch" in machine.packages()


def test_recreating_the_environment_keeps_the_other_choices(machine, monkeypatch):
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


def test_new_requirements_are_installed_into_the_existing_environment(machine):
    install.install()
    machine.packages()
    (machine.root / "setup.py").write_text("# another version")
    install.install()
    assert machine.packages() == [".[test]"] and len(machine.made) == 1


def test_new_constraints_also_apply_to_torch(machine):
    install.install()
    machine.packages()
    (machine.root / "constraints.txt").write_text("torch==2.12.0")
    install.install()
    assert machine.packages() == ALL[1:] and len(machine.made) == 1


def interrupt_at(package):
    """Start an installation and interrupt it when pip is called for a package."""

    def interrupted(what, *arguments):
        if arguments[-1] == package:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(install, "pip", interrupted)
        install.install()


def test_an_interrupted_installation_resumes_after_the_finished_stages(machine):
    interrupt_at(ALL[3])
    install.install()
    assert machine.packages() == ALL[2:] and len(machine.made) == 1  # torch is not downloaded again


def test_setting_an_index_after_an_interruption_keeps_the_environment(machine, monkeypatch):
    interrupt_at("torch")
    monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    install.install()
    assert len(machine.made) == 1
    assert any("https://example.org/cpu" in arguments for arguments in machine.pip)


@pytest.mark.parametrize("how", ["prefix", "VIRTUAL_ENV"])
def test_the_active_environment_is_never_removed(machine, monkeypatch, how):
    install.install()
    if how == "prefix":
        monkeypatch.setattr(install.sys, "prefix", str(machine.venv))
    else:
        monkeypatch.setenv("VIRTUAL_ENV", str(machine.venv))
    install.install()  # up to date: nothing to do
    monkeypatch.setenv("PYTHON", "other")
    with pytest.raises(install.InstallError, match="is active but must be recreated .* deactivate it first"):
        install.install()
    assert len(machine.made) == 1


def test_a_virtual_environments_python_resolves_to_its_base_interpreter(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    inside = install.probe(str(tmp_path / "env" / "bin" / "python"))
    assert inside.path == HERE.path and not inside.path.startswith(str(tmp_path))


@pytest.mark.parametrize("content", [None, "", "not ours", '{"name": "another tool\'s"}', "[]"])
def test_an_environment_not_made_by_the_installer_is_left_alone(machine, content):
    machine.venv.mkdir()
    (machine.venv / "thesis.txt").write_text("years of work")
    if content is not None:
        (machine.venv / install.STAMP).write_text(content)
    with pytest.raises(install.InstallError, match="was not made by this script and is left alone; move it away"):
        install.install()
    assert (machine.venv / "thesis.txt").read_text() == "years of work" and not machine.made


def test_an_environment_with_an_old_digest_stamp_is_reused(machine):
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").touch()
    (machine.venv / install.STAMP).write_text("0" * 64)
    install.install()
    assert machine.made == [] and machine.packages()[-5:] == ALL


@pytest.mark.parametrize("harm", ["moved", "no interpreter", "cut short"])
def test_a_broken_environment_is_recreated(machine, harm):
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


def test_concurrent_installations_wait_for_each_other(monkeypatch, tmp_path):
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
def test_an_unsupported_python_is_named_with_the_remedy(monkeypatch, version):
    monkeypatch.setattr(install, "probe", lambda python: install.Interpreter(python, version, "/include"))
    monkeypatch.setenv("PYTHON", "/usr/bin/python3")
    sentence = r"3.9 to 3.13 is needed, but /usr/bin/python3 is Python {}.{}; .* make PYTHON=".format(*version)
    with pytest.raises(install.InstallError, match=sentence):
        install.choose_python()
    monkeypatch.setattr(install, "probe", lambda python: None)
    with pytest.raises(install.InstallError, match="/usr/bin/python3 cannot be run"):
        install.choose_python()


def test_another_python_is_searched_if_the_current_one_is_unsupported(monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    versions = {"python3.12": (3, 12)}
    monkeypatch.setattr(
        install, "probe", lambda python: install.Interpreter(python, versions.get(os.path.basename(python), (3, 14)), "/include")
    )
    assert install.choose_python().path == "python3.12"


def test_a_pyenv_interpreter_is_found_even_if_not_selected(monkeypatch, tmp_path):
    for version in ("3.10.4", "3.9.18"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python{}".format(version.rpartition(".")[0])).touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PYTHON", "python3.10")
    there = lambda name: install.Interpreter(name, (3, 10), "") if str(tmp_path) in name else None  # noqa: E731
    monkeypatch.setattr(install, "probe", there)
    assert install.choose_python().path == str(tmp_path / "versions" / "3.10.4" / "bin" / "python3.10")


@pytest.mark.parametrize("requirement, version, sentence", [
    ("fairseq-light==0.1", (3, 11), "FAIRSEQ=fairseq-light==0.1 is unknown; use one of fairseq, fairseq-fixed, ve-fairseq"),
    ("fairseq==0.12.2", (3, 11), "does not import on Python 3.11; use fairseq-fixed==0.12.3.1, or PYTHON=python3.10"),
])  # fmt: skip
def test_an_incompatible_fairseq_is_refused(requirement, version, sentence):
    with pytest.raises(install.InstallError, match=sentence):
        install.check_fairseq(requirement, version)


def test_a_refused_choice_removes_nothing(machine, monkeypatch):
    install.install()
    monkeypatch.setenv("FAIRSEQ", "fairseq-light")
    with pytest.raises(install.InstallError, match="use one of fairseq"):
        install.install()
    assert len(machine.made) == 1


@pytest.mark.parametrize("version", ["1.13.1", "2.3", "3.0", "newest"])
def test_an_unsupported_torch_is_refused(monkeypatch, version):
    monkeypatch.setenv("TORCH", version)
    with pytest.raises(install.InstallError, match="TORCH={} is not a version from 2.4 up to 3".format(version)):
        install.given_choices()


@pytest.mark.parametrize("version, requirement", [((3, 9), "fairseq"), ((3, 10), "fairseq"), ((3, 11), "fairseq-fixed")])
def test_stock_fairseq_is_used_on_pythons_that_can_import_it(monkeypatch, version, requirement):
    monkeypatch.setattr(install, "why_nothing_can_be_built", lambda include: "")
    monkeypatch.setattr(install, "has_wheel", lambda requirement: False)
    assert install.name_of(install.default_fairseq(install.Interpreter("python", version, "/include"))) == requirement


def test_without_a_compiler_the_first_distribution_with_a_wheel_is_used(monkeypatch):
    monkeypatch.setattr(install, "why_nothing_can_be_built", lambda include: "no C++ compiler was found; install g++")
    monkeypatch.setattr(install, "has_wheel", lambda requirement: requirement.startswith("ve-"))
    assert install.default_fairseq(install.Interpreter("python", (3, 11), "")).startswith("ve-fairseq==")
    with pytest.raises(install.InstallError, match="fairseq==0.12.2 has no wheel .* install g"):
        install.default_fairseq(install.Interpreter("python", (3, 10), ""))


def test_only_stock_fairseq_is_built_in_isolation_from_torch(machine):
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


def test_a_pip_failure_names_what_could_not_be_installed(monkeypatch):
    monkeypatch.setattr(install.subprocess, "call", lambda *args, **kwargs: 1)
    with pytest.raises(install.InstallError, match="installing torch failed .* PIP_INDEX_URL"):
        install.pip("torch", "install", "torch")


def test_the_supported_versions_match_setup_py():
    text = (Path(install.__file__).parent.parent / "setup.py").read_text()
    (first, last), oldest = install.SUPPORTED, install.OLDEST_TORCH
    assert 'python_requires=">={}.{},<{}.{}"'.format(*first, last[0], last[1] + 1) in text
    assert "torch>={}.{},<3".format(*oldest) in text
    assert all(requirement in text for requirement in (install.STOCK, install.LATER[0]))
