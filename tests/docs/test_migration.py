"""docs/migration.md: our commands and flags exist, and its Python example works."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY

import fairseq_sparsemixer  # noqa: F401
from fairseq_sparsemixer.cli import build_parser
from fairseq_sparsemixer.plugin.models import TransformerMoEConfig

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
USER_DIR = ' --user-dir "$(fairseq-sparsemixer user-dir)"'
PARSERS = {"fairseq-train": options.get_training_parser, "fairseq-generate": options.get_generation_parser}
MODELS = ("transformer_moe", "transformer_lm_moe")


def our_commands():
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return [line.strip() for line in lines if USER_DIR in line and line.startswith("    ") or line.startswith("    fairseq-sp")]


def our_flags():
    """(flag, value or None) for the middle column of the tables."""
    cells = [line.split(" | ")[1] for line in TEXT.splitlines() if line.startswith("| ") and line.count(" | ") > 1]
    code = [words for cell in cells for words in re.findall(r"`([^`]+)`", cell) if words.startswith("--")]
    return {pair for words in code for pair in re.findall(r"--([\w-]+)(?: ([^-\s]\S*))?", words)}


def test_every_kind_of_command_is_shown():
    assert sorted({command.split()[0] for command in our_commands()}) == [
        "fairseq-generate",
        "fairseq-sparsemixer",
        "fairseq-train",
    ]


@pytest.mark.parametrize("command", our_commands())
def test_a_command_can_be_parsed(command):
    program, *words = shlex.split(command.replace(USER_DIR, ""))
    if program == "fairseq-sparsemixer":
        assert build_parser().parse_args(words).command == "convert"
    else:
        convert_namespace_to_omegaconf(options.parse_args_and_arch(PARSERS[program](), words))


def test_each_of_our_flags_exists():
    known = {"user_dir", *(option.name for option in fields(TransformerMoEConfig))}
    for arch in MODELS:
        for criterion in ("moe_label_smoothed_cross_entropy", "moe_cross_entropy"):
            words = f"DATA --task translation --arch {arch} --criterion {criterion} --optimizer adam".split()
            known |= set(vars(options.parse_args_and_arch(options.get_training_parser(), words)))
    flags = {flag.replace("-", "_") for flag, _ in our_flags()}
    assert len(flags) > 15 and flags <= known


@pytest.mark.parametrize("arch", sorted({value for flag, value in our_flags() if flag == "arch"}))
def test_each_of_our_architectures_exists(arch):
    assert arch in ARCH_MODEL_REGISTRY


def test_the_python_example_works():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {}
    exec(code, names)
    assert names["sample"].shape == (10, 1) and names["multiplier"].shape == (10, 16) and names["balance_loss"].shape == ()
