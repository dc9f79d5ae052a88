"""docs/flags.md: its flag table is up to date, and fairseq-train accepts or refuses every other row as the page says."""

import re
import shlex
from pathlib import Path

import pytest
from fairseq import options
from fairseq.criterions import CRITERION_REGISTRY
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.models import TransformerMoEConfig
from fairseq_sparsemixer.plugin.models.config import check_options
from scripts.flags import table, updated, without_table

try:
    from hydra import compose, initialize_config_dir
except ImportError:  # hydra 1.0, of fairseq 0.12.2
    from hydra.experimental import compose, initialize_config_dir

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
TEXT = without_table(PAGE)
USED, REFUSED = TEXT.split("\n## Refused\n")
GENERATION = re.search(r"\n## Generate\n.*?(?=\n## )", TEXT, re.S).group()
BASE = "data --task translation --arch transformer_moe --criterion moe_cross_entropy".split()


def rows(text):
    """The flags of each table row."""
    return re.findall(r"^\| `(--[^`]*)` \|", text, re.M)


def check(flags, task):
    """Run the checks that fairseq-train makes before it builds a model and a criterion. Raises ConfigurationError."""
    args = options.parse_args_and_arch(
        options.get_training_parser(), BASE + shlex.split(flags)
    )  # the last occurrence of a flag wins
    model = TransformerMoEConfig.from_namespace(args)
    check_options(model, {"encoder": 6, "decoder": 6})
    CRITERION_REGISTRY[args.criterion].build_criterion(args, task)


def test_the_flag_table_is_up_to_date():
    assert updated(PAGE) == PAGE, "run: python scripts/flags.py"


def test_every_flag_is_listed_under_a_purpose():
    ours = re.findall(r"^\| `(--[\w-]+)`", table(), re.M)
    missing = [flag for flag in ours if not re.search(rf"{flag}\b(?!-)", TEXT)]
    assert len(ours) > 20 and not missing


@pytest.mark.parametrize("flags", rows(GENERATION))
def test_generation_accepts_a_row_of_the_generation_table(flags):
    options.parse_args_and_arch(options.get_generation_parser(), ["data", "--path", "moe.pt", *shlex.split(flags)])


@pytest.mark.parametrize("flags", rows(USED.replace(GENERATION, "")))
def test_training_accepts_a_row(flags, translation_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(flags, translation_task)


@pytest.mark.parametrize("flags", rows(REFUSED))
def test_a_row_under_refused_is_refused_with_an_error_that_names_the_flag(flags, translation_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as refusal:
        check(flags, translation_task)
    assert any(flag in refusal.value.message for flag in re.findall(r"--[\w-]+", flags))


@pytest.mark.parametrize("override", re.findall(r"`(\+\+[^`]+)`", PAGE))
def test_hydra_sets_a_flag_that_the_file_lacks(override):
    name, value = override.lstrip("+").split("=")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "recipes" / "quickstart")):
        config = compose("quickstart", overrides=[override])
    assert str(OmegaConf.select(config, name)).lower() == value
