"""The WikiText-103 recipe at smoke size, and its settings."""

import json
import zipfile
from argparse import Namespace

import pytest
import yaml
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import main
from recipes.common.text import read_wikitext, write_splits
from recipes.wikitext103_lm.__main__ import ARCHIVE, CONFIG, MEMBERS, RECIPE, read_result


@pytest.mark.slow
def test_the_recipe_reports_the_perplexity_of_the_test_set(tmp_path):
    for action in ("prepare", "train", "evaluate"):
        main(RECIPE, [action, "--smoke", "--gpus", "0", "--updates", "5", "--out", str(tmp_path), "--num-experts", "2"])
    results = json.loads((tmp_path / "sparsemixer-e2-seed1-results.json").read_text())
    assert results["perplexity"] == pytest.approx(2 ** results["loss_in_bits"], rel=0.01)


def test_the_settings_equal_those_of_fairseqs_architecture():
    from fairseq_sparsemixer.plugin.models.transformer_lm_moe import wiki103

    architecture, model = Namespace(), yaml.safe_load(CONFIG.read_text())["model"]
    wiki103(architecture)
    for name in ("decoder_input_dim", "decoder_output_dim"):
        assert model.pop(name) == "${model.decoder_embed_dim}" and getattr(architecture, name) == architecture.decoder_embed_dim
    ours = {"_name", "router", "num_experts", "moe_freq", "jitter_eps"}
    assert {name: value for name, value in model.items() if name not in ours} == {
        name: getattr(architecture, name) for name in model if name not in ours
    }


def test_more_devices_than_blocks_in_a_batch_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="less than a block .512 tokens.; use at most 144 devices"):
        main(RECIPE, ["train", "--dry-run", "--gpus", "8", "--nodes", "32", "--slurm", "job", "--out", str(tmp_path)])


@pytest.mark.parametrize("gpus, tokens", [(1, "73,728"), (8, "73,728"), (64, "65,536")])
def test_tokens_per_update_are_a_whole_number_of_blocks_per_device(gpus, tokens, tmp_path, capsys):
    main(RECIPE, ["train", "--dry-run", "--gpus", str(gpus), "--out", str(tmp_path)])
    assert f"at most {tokens} tokens per update" in capsys.readouterr().out


def test_the_archive_is_read_and_a_split_without_words_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / ARCHIVE, "w") as archive:
        for split, member in MEMBERS.items():
            archive.writestr(member, " = Title = \n \n some words .\n" if split != "test" else " \n")
    with pytest.raises(ConfigurationError, match="the test split has no words"):
        write_splits(read_wikitext(tmp_path, ARCHIVE, MEMBERS), tmp_path / "words", Console(quiet=True))
    assert (tmp_path / "words" / "train").read_text() == "= Title =\n\nsome words .\n"


def test_the_last_line_of_fairseq_eval_lm_is_parsed():
    line = "2026-01-01 | INFO | fairseq_cli.eval_lm | Loss (base 2): 5.0000, Perplexity: 32.00\n"
    assert read_result(line) == {"loss_in_bits": 5.0, "perplexity": 32.0}
    assert read_result("Evaluated 10 tokens") is None
