"""The distributions of packages, errors for missing ones, and the requirements declared in setup.py."""

import ast
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools import requirements

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = {"yaml": "PyYAML"}  # if its name differs from the package's


def metadata_of(root: Path, name: str, files: dict) -> None:
    """Make an installed distribution, as in site-packages."""
    folder = root / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    for file, text in {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", **files}.items():
        (folder / file).write_text(text)


def test_all_distributions_of_a_package_are_found(monkeypatch, tmp_path):
    metadata_of(tmp_path, "ve-thing", {"top_level.txt": "thing\nthing_cli\n"})
    metadata_of(tmp_path, "thing-of-another-builder", {"RECORD": "thing/__init__.py,,\nthing/core.py,,\n"})
    (tmp_path / "thing").mkdir()
    for file in ("__init__.py", "core.py"):  # newer importlib.metadata leaves out missing files
        (tmp_path / "thing" / file).touch()
    metadata_of(tmp_path, "thing", {"top_level.txt": "something_else\n"})  # the name alone does not count
    monkeypatch.syspath_prepend(str(tmp_path))
    assert requirements.providers("thing") == ["thing-of-another-builder 1.0", "ve-thing 1.0"]
    assert requirements.providers("nothing_has_this") == []


@pytest.mark.parametrize("package, extra, command", [
    ("fairseq_cli", "fairseq", ["upcycle", "dense.pt", "moe.pt", "--num-experts", "2"]),
    ("matplotlib", "tools", ["plot", "run"]),
    ("matplotlib", "tools", ["study", "spec.yaml", "--out", "runs"]),
    ("shtab", "tools", ["completion", "bash"]),
])  # fmt: skip
def test_a_command_without_its_package_names_the_extra(monkeypatch, package, extra, command):
    from fairseq_sparsemixer import cli

    def missing(options):
        raise ModuleNotFoundError(f"No module named '{package}.deeper'", name=f"{package}.deeper")

    module = cli.import_module(f"fairseq_sparsemixer.cli.{cli.COMMANDS[command[0]].module}")
    monkeypatch.setattr(module, "run", missing)
    sentence = re.escape(f'{command[0]} needs {package}, which is not installed; pip install "fairseq-sparsemixer[{extra}]"')
    with pytest.raises(ConfigurationError, match=sentence):
        main(command)


def test_plot_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fairseq_sparsemixer.tools.plotting", raising=False)
    with pytest.raises(ConfigurationError, match="plot needs matplotlib"):
        main(["plot", str(tmp_path)])


def test_another_missing_module_stays_a_module_not_found_error(monkeypatch):
    from fairseq_sparsemixer.cli import user_dir

    def missing(options):
        raise ModuleNotFoundError("No module named 'ours'", name="ours")

    monkeypatch.setattr(user_dir, "run", missing)
    with pytest.raises(ModuleNotFoundError, match="ours"):
        main(["user-dir"])


@pytest.fixture(scope="module")
def declared():
    """The arguments that setup.py passes to setuptools."""
    arguments, setup, folder = {}, setuptools.setup, os.getcwd()
    setuptools.setup = lambda **given: arguments.update(given)
    os.chdir(ROOT)
    try:
        runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = setup
        os.chdir(folder)
    return arguments


def imported(*folders):
    """The top-level packages imported anywhere in the Python files of folders."""
    for folder in folders:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from (alias.name.partition(".")[0] for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    yield node.module.partition(".")[0]


def names(requirements_):
    return {re.split(r"[^\w.-]", requirement)[0].lower() for requirement in requirements_}


def test_every_imported_package_is_declared(declared):
    ours = {"fairseq_sparsemixer", "criterions"}
    # scipy is optional; several distributions provide fairseq; triton comes with torch's GPU builds
    optional = {"scipy", "fairseq", "fairseq_cli", "torch_xla", "triton"}
    standard = sys.stdlib_module_names if sys.version_info >= (3, 10) else set()
    if not standard:
        pytest.skip("needs the list of standard modules, in Python 3.10 and later")
    packages = set(imported("fairseq_sparsemixer", "criterions")) - ours - optional - set(standard)
    wanted = {DISTRIBUTION.get(package, package).lower() for package in packages}
    assert wanted <= names(declared["install_requires"]).union(
        *(names(declared["extras_require"][extra]) for extra in ("hf", "tools"))
    )


def test_each_package_of_an_extra_has_an_error_message(declared):
    assert set(requirements.EXTRAS.values()) == set(declared["extras_require"]) - {"dev", "test"}
    assert names(declared["extras_require"]["tools"]) == {
        package for package, extra in requirements.EXTRAS.items() if extra == "tools"
    }


def test_installing_the_package_does_not_install_fairseq(declared):
    assert not any("fairseq" in requirement for requirement in declared["install_requires"])


def test_every_link_of_the_package_page_is_absolute(declared):
    links = re.findall(r"\]\(([^)\s]+)\)", declared["long_description"])
    assert len(links) > 20 and all(link.startswith(("https://", "#")) for link in links)
    images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", declared["long_description"])
    assert images and not any("/blob/" in link for link in images)  # not the page about the image


def test_the_recipes_requirements_are_in_the_test_extra(declared):
    lines = (ROOT / "recipes" / "requirements.txt").read_text().splitlines()
    assert {line for line in lines if not line.startswith("#")} <= set(declared["extras_require"]["test"])
