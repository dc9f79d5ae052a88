"""Pre-training and fine-tuning, at their smoke sizes, the one after the other; what a task asks of fairseq."""

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
    """The folder of a pre-trained model."""
    out = tmp_path_factory.mktemp("electra")
    for action in ("prepare", "train", "evaluate"):
        main(ELECTRA, [action, *SMALL, "--updates", "5", "--out", str(out)])
    return out


@pytest.mark.slow
def test_pretraining_ends_with_figures_of_both_halves(pretrained):
    results = json.loads((pretrained / "sparsemixer-e2-seed1-results.json").read_text())
    assert 0 < results["rtd_accuracy"] <= 100 and results["mlm_loss"] > 0 and "rtd_recall" in results


@pytest.mark.slow
def test_fine_tuning_starts_from_it_and_ends_with_the_tasks_metric(pretrained, tmp_path):
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
def test_a_bad_label_is_named_before_anything_is_trained(pretrained, tmp_path):
    write_smoke_data("CoLA", tmp_path / "CoLA")
    path = tmp_path / "CoLA" / "dev.tsv"
    path.write_text(path.read_text().replace("\t1\t", "\t7\t", 1))
    folders = ("--raw-dir", str(tmp_path), "--pretrained", str(pretrained), "--out", str(tmp_path))
    with pytest.raises(ConfigurationError, match="dev.tsv:2: label '7' is none of 0, 1"):
        main(GLUE, ["prepare", "--task", "CoLA", *folders])


@pytest.mark.parametrize("task", TASKS)
def test_the_plan_of_each_task_is_said(task, tmp_path, capsys):
    for action in ("prepare", "train", "evaluate"):
        main(GLUE, [action, "--dry-run", "--gpus", "1", "--task", task, "--raw-dir", "GLUE", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert f"GLUE/{task}" in said and "checkpoint.finetune_from_model=" in said and "fairseq-validate" in said
    assert ("valid1" in said) == (task == "MNLI")
    epochs = 10 if task in ("RTE", "STS-B") else 3
    assert f"{epochs} epochs; the updates below are of 32 examples" in said and f"optimization.max_update={epochs} " in said


def test_a_tasks_flags_become_settings_of_their_groups(monkeypatch):
    monkeypatch.setattr(GlueTask, "has_score", lambda task: True)
    assert task_settings("CoLA") == {
        "task.num_classes": "2",
        "+criterion.report_mcc": True,
        "checkpoint.best_checkpoint_metric": "mcc",
        "checkpoint.maximize_best_checkpoint_metric": True,
    }
    assert task_settings("STS-B")["criterion.regression_target"] is True
    assert task_settings("MNLI")["dataset.valid_subset"] == "valid,valid1"


def test_where_fairseq_has_no_correlations_the_least_loss_is_best(monkeypatch):
    monkeypatch.setattr(GlueTask, "has_score", lambda task: False)
    settings = task_settings("STS-B")
    assert settings["checkpoint.best_checkpoint_metric"] == "loss" and not settings["checkpoint.maximize_best_checkpoint_metric"]
    assert task_settings("CoLA")["checkpoint.maximize_best_checkpoint_metric"]


def test_without_files_or_a_model_the_user_is_told_where_they_come_from(tmp_path):
    with pytest.raises(ConfigurationError, match="give --raw-dir DIR with GLUE's files"):
        main(GLUE, ["prepare", "--out", str(tmp_path)])
    with pytest.raises(ConfigurationError, match="one GPU"):
        main(GLUE, ["train", "--gpus", "8", "--out", str(tmp_path)])
