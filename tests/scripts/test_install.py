"""The installation: when it does nothing, and what it says when it cannot go on. It is not run here."""

import sys

import pytest

from scripts import install


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """The interpreters that install was called for, with a stamp of its own."""
    calls = []
    monkeypatch.setattr(install, "STAMP", str(tmp_path / "installed"))
    monkeypatch.setattr(install, "install", lambda python, version: calls.append(python))
    monkeypatch.setattr(install, "check_compiler", lambda include: None)
    monkeypatch.setenv("PYTHON", sys.executable)
    return calls


def test_the_second_call_does_nothing(installed):
    install.main()
    install.main()
    assert installed == [sys.executable]


@pytest.mark.parametrize("changed", ["setup.py", "constraints", "index"])
def test_it_installs_again_when_what_it_depends_on_changes(installed, monkeypatch, tmp_path, changed):
    for name in ("setup.py", "constraints.txt"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(install, "ROOT", str(tmp_path))
    monkeypatch.setattr(install, "CONSTRAINTS", str(tmp_path / "constraints.txt"))
    install.main()
    if changed == "index":
        monkeypatch.setenv("TORCH_INDEX", "https://example.org/cpu")
    else:
        (tmp_path / {"setup.py": "setup.py", "constraints": "constraints.txt"}[changed]).write_text("# another version")
    install.main()
    assert len(installed) == 2


def test_a_python_that_will_not_do_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(install, "probe", lambda python: ((3, 7), "/include"))
    monkeypatch.setenv("PYTHON", "python3.7")
    with pytest.raises(install.InstallError, match="3.8 to 3.12 is needed and python3.7 is Python 3.7; .* make PYTHON="):
        install.choose_python()
    monkeypatch.setattr(install, "probe", lambda python: None)
    with pytest.raises(install.InstallError, match="python3.7 cannot be run"):
        install.choose_python()


def test_another_python_is_looked_for_when_the_one_at_hand_will_not_do(monkeypatch):
    monkeypatch.delenv("PYTHON", raising=False)
    monkeypatch.setattr(install, "probe", lambda python: ((3, 12) if python == "python3.12" else (3, 13), "/include"))
    assert install.choose_python() == ("python3.12", (3, 12), "/include")


def test_a_missing_compiler_or_header_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(install.shutil, "which", lambda name: None)
    with pytest.raises(install.InstallError, match="no C\\+\\+ compiler"):
        install.check_compiler(str(tmp_path))
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/" + name)
    with pytest.raises(install.InstallError, match="has no Python.h"):
        install.check_compiler(str(tmp_path))


def test_a_failing_pip_is_reported_with_what_it_was_to_install(monkeypatch):
    monkeypatch.setattr(install.subprocess, "call", lambda *args, **kwargs: 1)
    with pytest.raises(install.InstallError, match="installing torch failed .* PIP_INDEX_URL"):
        install.pip("torch", "torch")
