"""A whole study, run and reported, with a script instead of fairseq."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study import runner
from fairseq_sparsemixer.tools.study.groups import baseline_of, by_group
from fairseq_sparsemixer.tools.study.results import gather
from fairseq_sparsemixer.tools.study.spec import read_study

pytestmark = pytest.mark.slow

SPEC = {
    "title": "played",
    "data": "bin",
    "flags": {"task": "translation", "max-update": 20},
    "routers": {"dense": {"router": "dense"}, "switch": {"router": "switch"}, "sparsemixer": {"router": "sparsemixer"}},
    "num-experts": [2],
    "seeds": [1, 2],
    "baseline": "switch",
    "test": {"metric": "bleu", "reference": "test.de"},
}
REFERENCE = ["ein Hund läuft durch den grünen Park", "zwei Kinder spielen am Strand mit einem Ball"] * 10
# fairseq-train: three validations, with the loss falling twice as fast for sparsemixer; fairseq-generate: a better model
# reproduces more of the reference. The file `fail` in the data folder makes Switch's second seed fail.
PLAYER = """
import json, os, sys
program, data, *flags = sys.argv[1:]
value = lambda name: flags[flags.index("--" + name) + 1] if "--" + name in flags else None
if program == "train":
    router, seed = value("router"), value("seed")
    if router == "switch" and seed == "2" and os.path.exists(os.path.join(data, "fail")):
        sys.exit(1)
    speed = {"dense": 0.5, "switch": 1, "sparsemixer": 2}[router]
    with open(value("log-file"), "a") as log:
        for done in (5, 10, 15, 20):
            loss = 8 - 0.1 * speed * done + 0.01 * int(seed)
            for entry in (
                {"loss": loss, "num_updates": done, "wps": 100, "wpb": 200},
                {"valid_loss": loss, "valid_num_updates": done},
            ):
                log.write("t | INFO | x | " + json.dumps({name: str(figure) for name, figure in entry.items()}) + "\\n")
    if router != "dense":
        with open(value("moe-load-file"), "w") as file:
            for done in (10, 20):
                print(json.dumps({"num_updates": done, "layers": ["a"], "load": [[3, 1]]}), file=file)
else:
    good = {"dense": 6, "switch": 10, "sparsemixer": 20}
    kept = next(count for router, count in good.items() if router in value("path"))
    for number, line in enumerate(open(os.path.join(data, "..", "test.de"), encoding="utf-8").read().splitlines()):
        print(f"D-{number}\\t-0.5\\t{line if number < kept else 'nichts'}")
"""


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    """The path of a study that runs PLAYER instead of fairseq."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "test.de").write_text("\n".join(REFERENCE) + "\n", encoding="utf-8")
    (tmp_path / "player.py").write_text(PLAYER)
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SPEC, sort_keys=False))
    play = [sys.executable, str(tmp_path / "player.py")]
    monkeypatch.setattr(runner, "executable", lambda command: [*play, command[0].split("-")[1], *command[1:]])
    return path


def test_a_study_reports_means_deviations_and_speed_up_over_the_baseline(study, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["study", str(study), "--out", str(out), "--workers", "2", "--json", str(tmp_path / "r.json")]) == 0
    groups = {group["group"]: group for group in json.loads((tmp_path / "r.json").read_text())["groups"]}
    assert list(groups) == ["dense", "switch-e2", "sparsemixer-e2"]
    assert groups["switch-e2"]["valid_loss"]["mean"] == pytest.approx(6.015)
    assert groups["switch-e2"]["valid_loss"]["deviation"] == pytest.approx(0.01 / 2**0.5)
    # twice as fast: at the final loss of the baseline's run with the same seed after half of its updates and time
    comparison = groups["sparsemixer-e2"]["comparison"]
    assert (comparison["baseline"], comparison["seeds"], comparison["not_reached"]) == ("switch-e2", [1, 2], [])
    assert comparison["difference"] == pytest.approx({"mean": -2, "low": -2, "high": -2})
    assert comparison["speed_up"]["updates"] == pytest.approx({"mean": 2, "low": 2, "high": 2})
    assert comparison["speed_up"]["seconds"] == pytest.approx({"mean": 2, "low": 2, "high": 2})
    assert groups["dense"]["comparison"]["not_reached"] == [1, 2] and groups["switch-e2"]["comparison"] is None
    assert groups["sparsemixer-e2"]["test"]["mean"] == pytest.approx(100)
    assert groups["sparsemixer-e2"]["bleu_p_value"] < 0.05
    translated = json.loads((tmp_path / "r.json").read_text())["translations"]["models"]["sparsemixer-e2"]
    assert translated["BLEU"]["difference"]["low"] > 0 and translated["chrF"]["mean"] == pytest.approx(100)
    assert groups["sparsemixer-e2"]["load_max"]["mean"] == pytest.approx(1.5)
    table = (out / "results.md").read_text()
    gaps = {gap["figure"]: gap for gap in json.loads((tmp_path / "r.json").read_text())["headroom"]}
    assert gaps["valid loss"]["gap"] == pytest.approx(1) and gaps["valid loss"]["deviation"] == pytest.approx(0.01 / 2**0.5)
    assert gaps["BLEU"]["distinct"] and "cannot tell routers apart" not in table
    assert f"torch {torch.__version__}" in table.splitlines()[-1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["sparsemixer", "2", "2", "4.015 ± 0.007", "100.00 ± 0.00"] in [row[:5] for row in cells]
    assert table in capsys.readouterr().out
    for name in ("curves.png", "speedup.png", "load.png"):
        assert (out / name).stat().st_size > 1000


def test_a_dense_baseline_applies_to_every_number_of_experts(study, tmp_path):
    study.write_text(study.read_text().replace("baseline: switch", "baseline: dense"))
    runner.run_study(read_study(study), tmp_path / "out", workers=1)
    assert main(["study", str(study), "--out", str(tmp_path / "out"), "--report-only"]) == 0
    groups = {group["group"]: group for group in json.loads((tmp_path / "out" / "results.json").read_text())["groups"]}
    assert groups["sparsemixer-e2"]["comparison"]["speed_up"]["updates"]["mean"] == pytest.approx(
        4
    )  # its loss falls four times as fast
    assert groups["switch-e2"]["comparison"]["speed_up"]["updates"]["mean"] == pytest.approx(2)
    assert groups["switch-e2"]["bleu_p_value"] == 1 and groups["dense"]["bleu_p_value"] is None  # they translate alike


def test_a_dense_model_is_compared_with_the_baseline_with_the_fewest_experts(study, tmp_path):
    study.write_text(study.read_text().replace("num-experts:\n- 2", "num-experts:\n- 4\n- 2"))
    runner.run_study(read_study(study), tmp_path / "out", workers=2)
    groups = by_group(gather(read_study(study), tmp_path / "out")["runs"])
    assert list(groups) == ["dense", "switch-e4", "switch-e2", "sparsemixer-e4", "sparsemixer-e2"]
    assert baseline_of(groups, "dense", "switch") == "switch-e2"


def test_a_failed_run_is_reported_and_rerun_while_finished_runs_are_kept(study, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "bin" / "fail"
    broken.touch()
    assert main(["study", str(study), "--out", str(out), "--workers", "1"]) == 1
    assert "switch-e2-seed2 failed in training" in capsys.readouterr().out
    finished = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert len(finished) == 5
    broken.unlink()
    assert main(["study", str(study), "--out", str(out), "--workers", "1"]) == 0
    assert len(list(out.glob("runs/*/result.json"))) == 6
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


def test_a_report_skips_a_truncated_result(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    (out / "runs/switch-e2-seed1/result.json").write_text('{"run": "swi')
    assert main(["study", str(study), "--out", str(out), "--report-only"]) == 0
    assert len(json.loads((out / "results.json").read_text())["runs"]) == 5


def test_a_diverged_run_is_reported(study, tmp_path, capsys):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    log = out / "runs/switch-e2-seed1/train.log"
    log.write_text(re.sub('"valid_loss": "[0-9.]+"', '"valid_loss": "nan"', log.read_text()))
    assert main(["study", str(study), "--out", str(out), "--report-only"]) == 0
    groups = {group["group"]: group for group in json.loads((out / "results.json").read_text())["groups"]}
    assert groups["switch-e2"]["valid_loss"]["mean"] is None and groups["dense"]["valid_loss"]["mean"] == pytest.approx(7.015)
    assert "nan" in capsys.readouterr().out


def test_a_folder_with_other_flags_is_refused(study, tmp_path):
    begun = read_study(study)
    runner.run_study(begun, tmp_path / "out", workers=1)
    (tmp_path / "out/runs/switch-e2-seed1/result.json").unlink()
    study.write_text(study.read_text().replace("max-update: 20", "max-update: 40"))
    with pytest.raises(ConfigurationError, match="begun with other flags"):
        runner.run_study(read_study(study), tmp_path / "out", workers=1)


def test_a_report_of_finished_runs_refuses_other_flags_and_data(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    before = study.read_text()
    report = ["study", str(study), "--out", str(out), "--report-only"]
    study.write_text(before.replace("max-update: 20", "max-update: 40"))
    with pytest.raises(ConfigurationError, match="dense-seed1 was begun with other flags, --max-update 20 where the study"):
        main(report)
    study.write_text(before)
    (tmp_path / "bin" / "dict.de.txt").write_text("x 1\n")
    with pytest.raises(ConfigurationError, match="dense-seed1 was begun with other data than .*bin has now"):
        main(report)
    (tmp_path / "bin" / "dict.de.txt").unlink()
    assert main(report) == 0


def test_a_report_of_some_runs_names_the_others(study, tmp_path, capsys):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    (out / "runs/switch-e2-seed1/result.json").unlink()
    assert main(["study", str(study), "--out", str(out), "--report-only"]) == 0
    assert "**Not finished:** switch-e2-seed1. The figures are of the other runs." in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["unfinished"] == ["switch-e2-seed1"]
    runner.run_study(read_study(study), out, workers=1)
    assert main(["study", str(study), "--out", str(out), "--report-only"]) == 0
    assert "Not finished" not in capsys.readouterr().out


def test_a_report_of_nothing_says_what_to_do(study, tmp_path):
    remedy = "is finished in .*out, and scored as its test says; run it without --report-only"
    with pytest.raises(ConfigurationError, match=remedy):
        main(["study", str(study), "--out", str(tmp_path / "out"), "--report-only"])


def scored_since(out, moment):
    return sorted(path.parent.name for path in out.glob("runs/*/test.txt") if path.stat().st_mtime_ns > moment)


@pytest.mark.parametrize("change", ["flags", "reference", "test added"])
def test_runs_are_scored_again_if_the_test_changes_and_not_trained_again(change, study, tmp_path):
    out, content = tmp_path / "out", dict(SPEC)
    if change == "test added":
        study.write_text(yaml.safe_dump({**content, "test": None}))
    runner.run_study(read_study(study), out, workers=1)
    logs = {path: path.read_text() for path in out.glob("runs/*/train.log")}
    moment = max(path.stat().st_mtime_ns for path in out.glob("runs/*/*"))
    study.write_text(yaml.safe_dump(SPEC))
    if change == "flags":
        study.write_text(yaml.safe_dump({**content, "test": {**content["test"], "flags": {"beam": 2}}}))
    if change == "reference":
        (tmp_path / "test.de").write_text("\n".join(["etwas ganz anderes steht hier"] * len(REFERENCE)) + "\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no run of"):  # the old scores do not count
        main(["study", str(study), "--out", str(out), "--report-only"])
    assert runner.run_study(read_study(study), out, workers=1) == []
    assert len(logs) == 6 and all(path.read_text() == text for path, text in logs.items())
    assert len(scored_since(out, moment)) == 6
    moment = max(path.stat().st_mtime_ns for path in out.glob("runs/*/*"))
    assert runner.run_study(read_study(study), out, workers=1) == [] and scored_since(out, moment) == []


def test_a_study_without_a_test_shows_no_scores_of_another_study_in_its_folder(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    study.write_text(yaml.safe_dump({**SPEC, "test": None}))
    assert main(["study", str(study), "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert all(group["test"] is None for group in results["groups"])
    assert [gap["figure"] for gap in results["headroom"]] == ["valid loss"]


def test_scores_of_earlier_versions_count_for_the_same_metric(study, tmp_path):
    out = tmp_path / "out"
    runner.run_study(read_study(study), out, workers=1)
    moment = max(path.stat().st_mtime_ns for path in out.glob("runs/*/*"))
    for path, old in zip(sorted(out.glob("runs/*/result.json")), [{"score": 7.0, "bits": 2.8}, {"score": 30.0}] * 3):
        path.write_text(json.dumps({**json.loads(path.read_text()), "test": old}))
    assert runner.run_study(read_study(study), out, workers=1) == []
    assert len(scored_since(out, moment)) == 3


def test_moving_a_study_with_its_data_keeps_its_runs(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = read_study(study)
    runner.run_study(begun, Path("out"), workers=1)
    (tmp_path / "moved").mkdir()
    for name in ("bin", "out", "study.yaml", "test.de"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    moved = read_study(tmp_path / "moved" / "study.yaml")
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "moved").glob("out/runs/*/result.json")}
    assert runner.run_study(moved, tmp_path / "moved" / "out", workers=1) == [] and len(finished) == 6
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())


def test_a_training_without_a_validation_fails_at_once(study, tmp_path):
    player = tmp_path / "player.py"
    player.write_text(player.read_text().replace('"valid_loss"', '"dev_loss"'))
    failures = runner.run_study(read_study(study), tmp_path / "out", workers=1)
    assert len(failures) == 6 and "dense-seed1 failed: " in failures[0] and "has no validation in its log" in failures[0]


def test_a_dry_run_prints_every_command_and_starts_none(study, tmp_path, capsys):
    assert main(["study", str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all(re.match(r"fairseq-train \S+/bin --user-dir \S+", line) for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_report_without_results_gives_a_one_line_error(study, tmp_path):
    with pytest.raises(ConfigurationError, match="no run of"):
        main(["study", str(study), "--out", str(tmp_path / "out"), "--report-only"])
