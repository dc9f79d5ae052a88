"""`fairseq-sparsemixer plot`, and the reading of runs behind it."""

import json
import math

import pytest

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.runs import read_run

LAYERS = ["encoder.layers.0", "decoder.layers.0"]


@pytest.fixture
def run_dir(tmp_path):
    """The logs of a run of 20 updates with 2 x 2 experts, as fairseq writes them: other text, repeated lines, a cut last one."""
    lines = ["{'_name': None}", "TransformerMoEModel("]
    for updates, loss, speed in ((10, 3.0, 100), (10, 3.0, 100), (20, 2.5, 300)):
        lines.append(json.dumps({"epoch": 1, "loss": "9", "wps": str(speed), "wpb": "600", "num_updates": str(updates)}))
        lines.append("2026 | INFO | valid | " + json.dumps({"valid_loss": str(loss), "valid_num_updates": str(updates)}))
    folder = tmp_path / "a_run"
    folder.mkdir()
    (folder / "train.log").write_text("\n".join([*lines, '{"valid_loss": "1.0", "valid_nu']))
    loads = [(10, [[5, 5], [9, 1]]), (20, [[5, 5], [9, 1]]), (20, [[5, 5], [11, 9]])]
    lines = [json.dumps({"num_updates": updates, "layers": LAYERS, "load": load}) for updates, load in loads]
    (folder / "load.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_is_read_from_its_logs(run_dir):
    run = read_run(run_dir)
    assert (run.name, run.updates, run.words_per_second) == ("a_run", 20, 200)
    assert run.seconds_per_update == (6 + 2) / 2
    assert run.valid_loss == [(10, 3.0), (20, 2.5)]
    assert run.load.layers == LAYERS and len(run.load.counts) == 2
    assert run.load.total() == [[0.5, 0.5], [20 / 30, 10 / 30]]


def test_load_entropy_is_one_for_even_loads_and_averages_layers(run_dir):
    uneven = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
    assert read_run(run_dir).load.entropy() == pytest.approx((1 + uneven) / 2)


def test_the_command_writes_plots_and_figures(run_dir, tmp_path, capsys):
    (run_dir / "load.jsonl").rename(tmp_path / "load.jsonl")
    dense = tmp_path / "dense"
    run_dir.rename(dense)
    run_dir.mkdir()
    (tmp_path / "load.jsonl").rename(run_dir / "load.jsonl")
    (run_dir / "train.log").write_text((dense / "train.log").read_text())
    assert main(["plot", str(dense), str(run_dir), "--out", str(tmp_path / "plots"), "--json", str(tmp_path / "f.json")]) == 0
    for name in ("valid_loss.png", "expert_load.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["run"] for row in figures] == ["dense", "a_run"]
    assert figures[0]["load_entropy"] is None and figures[1]["valid_loss"] == 2.5
    assert "a_run" in capsys.readouterr().out


def test_a_folder_without_a_log_is_refused_with_the_flags_that_write_one(tmp_path):
    with pytest.raises(ConfigurationError, match="has no train.log; train with --log-format json --log-file"):
        read_run(tmp_path)
    (tmp_path / "train.log").write_text("nothing of use\n")
    with pytest.raises(ConfigurationError, match="no figures"):
        read_run(tmp_path)
