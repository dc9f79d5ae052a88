"""Tuning: the value of a flag is chosen per model before its seeds are trained. A script replaces fairseq."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study import runner
from fairseq_sparsemixer.tools.study.spec import check_flags, read_study

SPEC = {
    "title": "played", "data": "bin", "num-experts": [2], "seeds": [1, 2],
    "flags": {"task": "language_modeling", "arch": "transformer_lm_moe_tiny", "max-update": 20, "lr": 9},
    "variants": {"dense": {"router": "dense"}, "switch": {"router": "switch"}, "fixed": {"router": "switch", "lr": 5}},
    "baseline": "switch", "test": {"metric": "perplexity"},
    "tune": {"flag": "lr", "values": [1, 2, 3], "flags": {"max-update": 4}},
}  # fmt: skip
# the loss is lowest at --lr 2 for Switch and at --lr 3 for dense; every training runs `program` in the data folder
PLAYER = """
import json, os, sys
program, data, *flags = sys.argv[1:]
value = lambda name: flags[flags.index("--" + name) + 1]
folder = os.path.dirname(value("save-dir") if program == "train" else os.path.dirname(value("path")))
with open(os.path.join(data, "started"), "a") as file:
    print(os.path.basename(folder), program, file=file)
if program == "train":
    router, lr = value("router"), int(value("lr"))
    exec(open(os.path.join(data, "program")).read())
    loss = 5 + abs(lr - {"dense": 3, "switch": 2}[router])
    with open(value("log-file"), "a") as log:
        log.write("t | INFO | x | " + json.dumps({"valid_loss": str(loss), "valid_num_updates": value("max-update")}) + "\\n")
else:
    print("x | Loss (base 2): 5.0000, Perplexity: 32.00")
"""
TRIALS = [f"{model}-lr{value}-seed1" for model in ("dense", "switch-e2") for value in (1, 2, 3)]
RUNS = [f"{model}-seed{seed}" for seed in (1, 2) for model in ("dense", "switch-e2", "fixed-e2")]

pytestmark = pytest.mark.slow


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """The path of a study that runs PLAYER instead of fairseq."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "program").write_text("")
    (tmp_path / "player.py").write_text(PLAYER)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    play = [sys.executable, str(tmp_path / "player.py")]
    monkeypatch.setattr(runner, "REFRESH", 0.01)
    monkeypatch.setattr(runner, "executable", lambda command: [*play, command[0].split("-")[1], *command[1:]])
    return tmp_path / "study.yaml"


def run(study: Path) -> list:
    return runner.run_study(read_study(study), study.parent / "out", workers=1)


def started(study: Path) -> list:
    return [line.split() for line in (study.parent / "bin" / "started").read_text().splitlines()]


def change(study: Path, **tune) -> None:
    study.write_text(yaml.safe_dump({**SPEC, "tune": {**SPEC["tune"], **tune}}, sort_keys=False))


def command(study: Path, name: str) -> str:
    return (study.parent / "out" / "runs" / name / "command.txt").read_text()


def models(study: Path) -> dict:
    main(["study", str(study), "--out", str(study.parent / "out"), "--report-only"])
    results = json.loads((study.parent / "out" / "results.json").read_text())
    return {model["group"]: model for model in results["tuning"]["models"]}


def test_every_value_is_tried_with_one_seed_then_all_seeds_use_the_best(study):
    assert run(study) == []
    trained = [name for name, program in started(study) if program == "train"]
    assert trained == [*TRIALS, *RUNS]
    assert [name for name, program in started(study) if program != "train"] == RUNS  # trials do not use the test set
    assert "--max-update 20 " in command(study, "switch-e2-seed1") and "--max-update 4 " in command(study, TRIALS[0])
    values = {name: command(study, name).split("--lr ")[1].split()[0] for name in [*TRIALS, *RUNS]}
    assert [values[name] for name in TRIALS] == ["1", "2", "3"] * 2
    assert [values[name] for name in RUNS] == ["3", "2", "5"] * 2  # a variant that sets the flag keeps its value


def test_the_report_has_the_losses_of_all_values_and_a_warning_at_the_edge(study, capsys):
    run(study)
    assert models(study)["switch-e2"] == {
        "group": "switch-e2",
        "tried": [{"value": value, "valid_loss": 5 + abs(value - 2), "diverged": False} for value in (1, 2, 3)],
        "chosen": 2,
        "edge": None,
    }
    assert (models(study)["dense"]["chosen"], models(study)["dense"]["edge"]) == (3, "highest")
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]
    assert ["model", "1", "2", "3", "chosen"] in rows and ["dense", "7.000", "6.000", "5.000", "3"] in rows
    assert "with seed 1, --max-update 4." in shown
    assert (
        "**Warning:** the best lr is at the edge of the values tried, and a better one may lie beyond: dense (3, the highest)."
        in shown
    )


def test_finished_trials_are_not_run_again(study):
    run(study)
    before = len(started(study))
    assert run(study) == [] and len(started(study)) == before
    (study.parent / "out" / "runs" / TRIALS[1] / "result.json").unlink()
    assert run(study) == [] and started(study)[before:] == [[TRIALS[1], "train"]]


def test_a_value_that_diverges_is_reported_and_never_chosen(study, capsys):
    (study.parent / "bin" / "program").write_text(
        "if router == 'switch' and lr == 2: sys.exit('FloatingPointError: gradients are Nan/Inf')"
    )
    assert run(study) == []
    assert models(study)["switch-e2"]["tried"][1] == {"value": 2, "valid_loss": None, "diverged": True}
    assert models(study)["switch-e2"]["chosen"] == 1 and "diverged" in capsys.readouterr().out


def test_a_nan_loss_counts_as_diverged(study):
    run(study)
    log = study.parent / "out" / "runs" / TRIALS[4] / "train.log"
    log.write_text(log.read_text().replace('"5"', '"nan"'))
    with pytest.raises(ConfigurationError, match="--lr 2 where the study now has --lr 1"):  # which is chosen instead
        models(study)
    for result in study.parent.glob("out/runs/switch-e2-seed?/result.json"):
        result.unlink()
    assert models(study)["switch-e2"]["tried"][1]["diverged"]


def test_a_model_that_always_diverges_is_left_out_and_the_others_continue(study):
    (study.parent / "bin" / "program").write_text("if router == 'switch' and lr < 4: sys.exit('FloatingPointError: Nan')")
    assert run(study) == ["switch-e2 is not trained: it diverged with every lr that was tried; give other values"]
    assert [name for name, program in started(study)[len(TRIALS) :] if program == "train"] == [
        name for name in RUNS if "switch" not in name
    ]


def test_a_model_with_a_failed_trial_waits_for_the_next_call(study):
    (study.parent / "bin" / "program").write_text("if router == 'switch' and lr == 3: sys.exit('OSError: no space')")
    (failure,) = run(study)
    assert failure.startswith("switch-e2-lr3-seed1 failed in training: OSError: no space")
    assert models(study)["switch-e2"]["chosen"] is None
    (study.parent / "bin" / "program").write_text("")
    before = len(started(study))
    assert run(study) == []
    assert [name for name, program in started(study)[before:] if program == "train"] == [
        TRIALS[5],
        "switch-e2-seed1",
        "switch-e2-seed2",
    ]


def test_values_can_be_added_unless_that_changes_finished_runs(study):
    run(study)
    change(study, values=[1, 2, 3, 8])
    assert run(study) == [] and models(study)["dense"]["edge"] is None
    change(study, values=[1, 8])
    with pytest.raises(ConfigurationError, match="--lr 3 where the study now has --lr 1; give another --out"):
        run(study)


def test_a_dry_run_shows_the_trials_and_the_open_choices(study, capsys):
    dry_run = ["study", str(study), "--out", str(study.parent / "out"), "--dry-run"]
    assert main(dry_run) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(TRIALS) + len(RUNS) and sum("--lr CHOSEN" in line for line in lines) == 4
    run(study)
    assert main(dry_run) == 0 and "CHOSEN" not in capsys.readouterr().out


def test_a_separate_tuning_seed_leaves_all_seeds_for_the_comparison(study):
    change(study, seed=7)
    names = [trial.name for trial in read_study(study).trials()]
    assert names == [name.replace("seed1", "seed7") for name in TRIALS]


@pytest.mark.parametrize("tune, complaint", [
    ({"flag": "lrr"}, "has tune: lrr: 1, and fairseq-train has no such flag"),
    ({"flags": {"max-updat": 3}}, "has tune: max-updat: 3, and fairseq-train has no such flag"),
])  # fmt: skip
def test_the_tuned_flag_must_be_a_flag_of_fairseq_train(study, tune, complaint):
    change(study, **tune)
    with pytest.raises(ConfigurationError, match=complaint):
        check_flags(study, read_study(study))
