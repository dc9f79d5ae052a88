"""The whole Multi30k recipe, at smoke size."""

import json

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import main
from recipes.multi30k_en_de.__main__ import RECIPE


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(action, option, ...): one action of the recipe, always in the same folder, with a few training updates."""
    out = tmp_path_factory.mktemp("multi30k")
    small = ("--smoke", "--gpus", "0", "--updates", "10", "--router", "switch")

    def run(action, *options):
        main(RECIPE, [action, "--out", str(out), *small, *options])

    run.out = out
    return run


@pytest.fixture(scope="module")
def finished(run):
    """The output folder of a finished run."""
    for action in ("prepare", "train", "evaluate"):
        run(action)
    return run.out


@pytest.mark.slow
def test_the_recipe_reports_sacrebleu_on_every_test_sentence(finished):
    results = json.loads((finished / "switch-e4-seed1-results.json").read_text())
    assert results["bleu"] >= 0 and "tok:13a" in results["signature"] and "nrefs:1" in results["signature"]
    translated = (finished / "switch-e4-seed1-test" / "translation.txt").read_text(encoding="utf-8")
    assert translated.count("\n") == 50  # not a multiple of 8, so fairseq would drop some by default


@pytest.mark.slow
def test_the_run_writes_the_logs_needed_for_plots(finished):
    from fairseq_sparsemixer.tools.runs import read_run

    run = read_run(finished / "switch-e4-seed1")
    assert run.updates == 10 and run.valid_loss


@pytest.mark.slow
def test_finished_steps_are_not_repeated(finished, run, capsys):
    checkpoint = finished / "switch-e4-seed1" / "checkpoint_last.pt"
    before = checkpoint.stat().st_mtime_ns
    for action in ("prepare", "train", "evaluate"):
        run(action)
    assert checkpoint.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("done before") == 3


@pytest.mark.slow
def test_changing_the_number_of_devices_keeps_the_run(finished, run, capsys):
    run("train", "--gpus", "8", "--dry-run")
    said = capsys.readouterr().out
    assert "done before" in said and "+distributed_training.distributed_world_size=8" in said and "dataset.max_tokens=128" in said


def test_actions_out_of_order_name_the_one_to_run_first(tmp_path):
    with pytest.raises(ConfigurationError, match="run first: python -m recipes.multi30k_en_de prepare"):
        main(RECIPE, ["train", "--out", str(tmp_path), "--gpus", "0"])
    with pytest.raises(ConfigurationError, match="run first: python -m recipes.multi30k_en_de train"):
        main(RECIPE, ["evaluate", "--out", str(tmp_path), "--gpus", "0"])
