"""ELECTRA pre-training, then GLUE fine-tuning, at smoke size; fairseq settings per task."""

import json

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.glue import TASKS, GlueTask
from recipes.common.session import main
from recipes.electra_base.__main__ import RECIPE as ELECTRA
from recipes.glue.__main__ import RECIPE as GLUE
from recipes.glue.__main__ import task_settings
from recipes.glue.smoke_data import write_smoke_data

SMALL = ("--smoke", "--gpus", "0", "--num-experts", "2")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """The output folder of pre-training."""
    out = tmp_path_factory.mktemp("electra")
    for action in ("prepare", "train", "evaluate"):
        main(ELECTRA, [action, *SMALL, "--updates", "5", "--out", str(out)])
    return out


@pytest.mark.slow
def test_pretraining_reports_metrics_of_generator_and_discriminator(pretrained):
    results = json.loads((pretrained / "sparsemixer-e2-seed1-results.json").read_text())
    assert 0 < results["rtd_accuracy"] <= 100 and results["mlm_loss"] > 0 and "rtd_recall" in results


@pytest.mark.slow
def test_fine_tuning_starts_from_the_pretrained_model_and_reports_the_tasks_metric(pretrained, tmp_path):
    for action in ("prepare", "train", "evaluate"):
        main(GLUE, [action, *SMALL, "--task", "STS-B", "--pretrained", str(pretrained), "--out", str(tmp_path), "--updates", "3"])
    folder = tmp_path / "STS-B"
    results = json.loads((folder / "sparsemixer-e2-seed1-valid-results.json").read_text())
    assert results["split"] == "valid" and results["loss"] >= 0
    if TASKS["STS-B"].has_score():  # not on fairseq 0.12.2
        mean = (results["pearson"] + results["spearman"]) / 2
        assert results["pearson_and_spearman"] == pytest.approx(mean, abs=0.1)  # rounded
    assert "loaded checkpoint" in (folder / "sparsemixer-e2-seed1" / "console.log").read_text().lower()


@pytest.mark.slow
def test_a_bad_label_is_reported_by_prepare(pretrained, tmp_path):
    write_smoke_data("CoLA", tmp_path / "CoLA")
    path = tmp_path / "CoLA" / "dev.tsv"
    path.write_text(path.read_text().replace("\t1\t", "\t7\t", 1))
    folders = ("--raw-dir", str(tmp_path), "--pretrained", str(pretrained), "--out", str(tmp_path))
    with pytest.raises(ConfigurationError, match="dev.tsv:2: label '7' is not one of 0, 1"):
        main(GLUE, ["prepare", "--task", "CoLA", *folders])


@pytest.mark.parametrize("task", TASKS)
def test_dry_run_prints_the_plan_of_each_task(task, tmp_path, capsys):
    for action in ("prepare", "train", "evaluate"):
        main(GLUE, [action, "--dry-run", "--gpus", "1", "--task", task, "--raw-dir", "GLUE", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"GLUE/{task}" in said and "checkpoint.finetune_from_model=" in said and "fairseq-validate" in said
    assert ("valid1" in said) == (task == "MNLI")
    epochs = 10 if task in ("RTE", "STS-B") else 3
    assert f"{epochs} epochs; the updates below assume 32 examples" in said and f"optimization.max_update={epochs} " in said


def test_a_tasks_flags_are_mapped_to_hydra_groups(monkeypatch):
    monkeypatch.setattr(GlueTask, "has_score", lambda task: True)
    assert task_settings("CoLA") == {
        "task.num_classes": "2",
        "+criterion.report_mcc": True,
        "checkpoint.best_checkpoint_metric": "mcc",
        "checkpoint.maximize_best_checkpoint_metric": True,
    }
    assert task_settings("STS-B")["criterion.regression_target"] is True
    assert task_settings("MNLI")["dataset.valid_subset"] == "valid,valid1"


def test_without_correlations_in_fairseq_the_best_checkpoint_has_the_lowest_loss(monkeypatch):
    monkeypatch.setattr(GlueTask, "has_score", lambda task: False)
    settings = task_settings("STS-B")
    assert settings["checkpoint.best_checkpoint_metric"] == "loss" and not settings["checkpoint.maximize_best_checkpoint_metric"]
    assert task_settings("CoLA")["checkpoint.maximize_best_checkpoint_metric"]


def test_missing_files_and_too_many_gpus_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="pass --raw-dir DIR with GLUE's files"):
        main(GLUE, ["prepare", "--out", str(tmp_path)])
    with pytest.raises(ConfigurationError, match="one GPU"):
        main(GLUE, ["train", "--gpus", "8", "--out", str(tmp_path)])
