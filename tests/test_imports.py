"""Imports: one direction between packages, and no heavy libraries in light commands."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fairseq_sparsemixer
from fairseq_sparsemixer import options

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "fairseq_sparsemixer"
SHARED = {"errors", "files", "languages", "names", "options", "ranges"}  # modules next to the packages, which import none of them
MAY_IMPORT = {  # in addition to itself and SHARED
    "moe": set(),
    "criterions": {"moe"},
    "plugin": {"moe", "criterions"},
    "tools": {"moe", "criterions", "plugin"},
    "cli": {"moe", "criterions", "plugin", "tools"},
}


def modules(package: str):
    """(path, tree) of each module of a package."""
    folder = ROOT / package if package == "criterions" else ROOT / PACKAGE / package
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in sorted(folder.rglob("*.py"))]


def imported(tree: ast.AST):
    """The dotted names that a module imports anywhere."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([f"{node.module}.{alias.name}" for alias in node.names] if node.module == PACKAGE else [node.module])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_allowed_packages(package):
    found = modules(package)
    assert found
    for path, tree in found:
        rooms = {name.split(".")[1] for name in imported(tree) if name.startswith(PACKAGE + ".")}
        public = {"__version__", "register", "build_moe_layer"}
        assert rooms <= MAY_IMPORT[package] | SHARED | {package} | public, path


@pytest.mark.parametrize("name", sorted(SHARED))
def test_shared_modules_import_no_package(name):
    tree = ast.parse((ROOT / PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    others = {other for other in imported(tree) if other.startswith(PACKAGE) or other.split(".")[0] in ("torch", "fairseq")}
    assert others <= {f"{PACKAGE}.errors"}


def test_the_core_does_not_import_fairseq():
    for path, tree in modules("moe"):
        assert not [name for name in imported(tree) if name.split(".")[0] in ("fairseq", "fairseq_cli")], path


def python(program: str) -> str:
    """The output of a program in a new Python process."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


HEAVY = """
loaded = {name.partition('.')[0] for name in sys.modules} & {'torch', 'fairseq', 'fairscale', 'matplotlib', 'numpy'}
print('\\nloaded:', *sorted(loaded))
"""
LIGHT = (["user-dir"], ["--help"], ["--version"], ["completion", "bash"], ["upcycle", "--help"], ["launch", "--help"])


@pytest.mark.parametrize("command", LIGHT, ids=" ".join)
def test_light_commands_load_no_heavy_library(command):
    if command[0] == "completion":
        pytest.importorskip("shtab")
    program = f"""
import sys
from fairseq_sparsemixer.cli import main
try:
    main({command})
except SystemExit as done:
    assert not done.code
{HEAVY}"""
    assert python(program).splitlines()[-1] == "loaded:"


def test_importing_the_package_loads_no_library():
    assert python(f"import sys, fairseq_sparsemixer\n{HEAVY}") == "loaded:"


def test_a_layer_needs_no_fairseq():
    assert python(f"import sys\nfrom fairseq_sparsemixer import build_moe_layer\n{HEAVY}") == "loaded: fairscale numpy torch"


REGISTERED = """
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.criterions import CRITERION_REGISTRY
import fairseq_cli.train
from fairseq_sparsemixer.plugin.trainer import MoETrainer
assert "transformer_moe" in ARCH_MODEL_REGISTRY and "moe_cross_entropy" in CRITERION_REGISTRY
assert fairseq_cli.train.Trainer is MoETrainer
print("registered")
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", [
    "import fairseq_sparsemixer; fairseq_sparsemixer.register(); fairseq_sparsemixer.register()",
    "import fairseq_sparsemixer, importlib.util; importlib.util.find_spec('fairseq'); import fairseq",
    "from fairseq_sparsemixer.plugin.checkpoints.reading import read_checkpoint",
])  # fmt: skip
def test_everything_is_registered_in_any_import_order(first):
    assert python(first + "\n" + REGISTERED) == "registered"


@pytest.mark.parametrize("name", sorted(fairseq_sparsemixer.__all__))
def test_public_names_exist(name):
    assert getattr(fairseq_sparsemixer, name) is not None


def test_the_former_name_of_shard_experts_still_works():
    assert fairseq_sparsemixer.spread_experts is fairseq_sparsemixer.shard_experts


def test_help_texts_list_everything_registered():
    from fairseq_sparsemixer.moe.estimators import ESTIMATORS
    from fairseq_sparsemixer.moe.experts import ACTIVATIONS, GATED_ACTIVATIONS
    from fairseq_sparsemixer.moe.gates import DENSE, registry

    ours = sorted(name for name, gate in registry.GATES.items() if gate.__module__.startswith(PACKAGE))
    assert options.ROUTERS == ", ".join([DENSE, *ours])
    assert options.ESTIMATORS == ", ".join(ESTIMATORS)
    assert options.ACTIVATIONS == ", ".join([*ACTIVATIONS, *GATED_ACTIVATIONS])


def test_the_flags_of_fidelity_match_its_tools():
    from fairseq_sparsemixer.cli import fidelity
    from fairseq_sparsemixer.tools.fidelity.losses import LOSSES, STEP
    from fairseq_sparsemixer.tools.fidelity.methods import METHODS
    from fairseq_sparsemixer.tools.fidelity.requested import SYNTHETIC_TOKENS, TRAINED_TOKENS

    assert list(fidelity.LOSSES) == list(LOSSES)
    assert fidelity.METHODS.split(",") == list(dict.fromkeys(method.name for method in METHODS))
    assert (STEP, SYNTHETIC_TOKENS, TRAINED_TOKENS) == (2, 16, 64)  # as in its help text


def test_our_flags_equal_those_generated_by_fairseq():
    from argparse import ArgumentParser

    from fairseq.dataclass import FairseqDataclass
    from fairseq.dataclass.utils import gen_parser_from_dataclass

    from fairseq_sparsemixer.cli.flags import add_flags

    ours, theirs = ArgumentParser(), ArgumentParser()
    add_flags(ours, options.MoEOptions)
    gen_parser_from_dataclass(theirs, type("Flags", (options.MoEOptions, FairseqDataclass), {})())
    words = "--router switch --num-experts 4 --capacity-factor 1.5 --router-bias --moe-top-k 2".split()
    for given in ([], words):
        assert vars(ours.parse_args(given)) == vars(theirs.parse_args(given))
    described = [{a.dest: a.help for a in parser._actions if a.dest != "help"} for parser in (ours, theirs)]
    assert described[0].keys() == described[1].keys()
