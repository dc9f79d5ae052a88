"""docs/tasks.md: the named programs can parse its commands."""

import re
import shlex
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

import fairseq_sparsemixer  # noqa: F401
from fairseq_sparsemixer.cli import build_parser
from fairseq_sparsemixer.tools.glue import TASKS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
PARSERS = {
    "fairseq-preprocess": options.get_preprocessing_parser,
    "fairseq-train": options.get_training_parser,
    "fairseq-eval-lm": options.get_eval_lm_parser,
    "fairseq-interactive": options.get_interactive_generation_parser,
    "fairseq-validate": options.get_validation_parser,
}


def commands():
    """Each indented command, with continued lines joined."""
    lines = re.sub(r"\\\n\s*", "", TEXT).splitlines()
    return [line.strip().lstrip("$ ") for line in lines if re.match(r"    (\$ )?fairseq-", line)]


def test_every_kind_of_command_is_shown():
    assert {command.split()[0] for command in commands()} == {*PARSERS, "fairseq-sparsemixer"}


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_parsed(command):
    if "--report-mcc" in command and not TASKS["CoLA"].has_score():
        pytest.skip("this fairseq has no --report-mcc, as the page says")
    program, *words = shlex.split(command.replace(' --user-dir "$UD"', ""))
    if program == "fairseq-sparsemixer":
        assert build_parser().parse_args(words).task == "CoLA"
    elif program == "fairseq-preprocess":
        assert PARSERS[program]().parse_args(words).only_source
    else:
        convert_namespace_to_omegaconf(options.parse_args_and_arch(PARSERS[program](), words))
