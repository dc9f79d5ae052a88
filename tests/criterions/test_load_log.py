"""--moe-load-file: tokens per expert as JSON lines."""

import json
import math

import pytest
import torch
from fairseq_sparsemixer.criterions.load_log import LoadLog
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError


def test_a_line_has_the_sums_over_its_interval(tmp_path):
    log = LoadLog(str(tmp_path / "deep" / "load.jsonl"), interval=2)
    for update in range(5):
        log.watch(["encoder.layers.0"], update)
        log.add(torch.tensor([[1.0, update]]))
    lines = [json.loads(line) for line in (tmp_path / "deep" / "load.jsonl").read_text().splitlines()]
    assert lines == [
        {"num_updates": 2, "layers": ["encoder.layers.0"], "load": [[2, 1]]},
        {"num_updates": 4, "layers": ["encoder.layers.0"], "load": [[2, 5]]},
    ]


def test_a_line_has_the_languages_with_tokens_and_each_layers_experts(tmp_path):
    log = LoadLog(str(tmp_path / "load.jsonl"), 2, ["de", "fr", "tr"])
    for update in range(2):
        log.watch(["encoder.layers.0", "decoder.layers.0"], update)
        log.add(torch.tensor([[4.0, 1.0], [5.0, math.nan]]), torch.tensor([[[3, 1], [0, 0], [1, 0]], [[4, 0], [0, 0], [1, 0]]]))
    line = json.loads((tmp_path / "load.jsonl").read_text())
    assert line["load"] == [[8, 2], [10]] and line["languages"] == ["de", "tr"]
    assert line["language_load"] == [[[6, 2], [2, 0]], [[8], [2]]]


def test_validation_is_not_recorded(tmp_path):
    log = LoadLog(str(tmp_path / "load.jsonl"), interval=1)
    log.watch(["encoder.layers.0"], None)
    log.add(torch.ones(1, 2))
    assert (tmp_path / "load.jsonl").read_text() == ""


@pytest.mark.parametrize("rank, lines", [(0, 1), (1, 0)])
def test_only_the_first_of_several_ranks_writes(tmp_path, monkeypatch, rank, lines):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    log = LoadLog(str(tmp_path / "load.jsonl"), interval=1)
    log.watch(["l"], 0)
    log.add(torch.ones(1, 2))
    assert len((tmp_path / "load.jsonl").read_text().splitlines()) == lines


def test_a_resumed_run_appends(tmp_path):
    for update in (0, 1):
        log = LoadLog(str(tmp_path / "load.jsonl"), interval=1)
        log.watch(["l"], update)
        log.add(torch.ones(1, 2))
    assert len((tmp_path / "load.jsonl").read_text().splitlines()) == 2


def test_an_unwritable_file_is_reported_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="--moe-load-file .* cannot be written .*; give another path"):
        LoadLog(str(tmp_path), interval=1)


def test_a_full_disk_loses_a_line_and_gives_a_warning(tmp_path, caplog):
    path = tmp_path / "load.jsonl"
    log = LoadLog(str(path), interval=1)

    def add(update):
        log.watch(["l"], update)
        log.add(torch.ones(1, 2))

    add(0)
    whole = path.read_text()
    path.unlink()
    path.mkdir()  # an error even for root
    add(1)
    assert caplog.messages == [f"--moe-load-file {path} lacks update 2 (Is a directory); make room there"]
    path.rmdir()
    path.write_text(whole + whole[:10])  # as left by a full disk
    add(2)
    lines = [json.loads(line)["num_updates"] for line in path.read_text().splitlines() if line.endswith("}")]
    assert lines == [1, 3]
