"""A study with fairseq's own commands, killed in the middle and restarted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fairseq_sparsemixer.cli import main

pytestmark = pytest.mark.slow

UPDATES, SAVE_EVERY = 12, 3
PATIENCE = 600  # seconds to wait for the moment at which to kill the study
FLAGS = {
    "task": "translation", "arch": "transformer_moe_tiny", "encoder-layers": 1, "decoder-layers": 1, "update-freq": 4,
    "criterion": "moe_cross_entropy", "optimizer": "adam", "lr": 0.01, "batch-size": 4, "max-update": UPDATES,
    "save-interval-updates": SAVE_EVERY, "keep-interval-updates": 1, "log-interval": 1, "num-workers": 0,
}  # fmt: skip


@pytest.fixture
def study(corpus, tmp_path) -> Path:
    """Two runs, dense and SparseMixer; `valid` is also the test set."""
    (tmp_path / "bin").symlink_to(corpus)
    (tmp_path / "reference.en").write_text((corpus.parent / "valid.en").read_text())
    test = {"gen-subset": "valid", "beam": 1, "max-len-b": 10, "required-batch-size-multiple": 1}
    spec = {
        "title": "tiny", "data": "bin", "flags": FLAGS, "num-experts": [2], "seeds": [1], "baseline": "dense",
        "routers": {"dense": {"router": "dense"}, "sparsemixer": {"router": "sparsemixer"}},
        "test": {"metric": "bleu", "reference": "reference.en", "flags": test},
    }  # fmt: skip
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    return tmp_path / "study.yaml"


def kill_when(there: Path, command) -> None:
    """Send SIGKILL to the command and all its children, which share its session, once a file exists."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + PATIENCE
        while not there.exists():
            assert process.poll() is None and time.monotonic() < end, f"no {there}"
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_study_killed_in_its_second_run_resumes_it_and_keeps_the_first(study, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, command = tmp_path / "out", ["study", str(study), "--out", str(tmp_path / "out"), "--workers", "1"]
    first, second = out / "runs" / "dense-seed1", out / "runs" / "sparsemixer-e2-seed1"
    kill_when(second / "checkpoints" / "checkpoint_last.pt", [sys.executable, "-m", "fairseq_sparsemixer", *command])
    finished = (first / "result.json").stat().st_mtime_ns
    assert not (second / "result.json").exists()
    cut_off = (second / "output.txt").stat().st_size

    assert main(command) == 0
    assert (first / "result.json").stat().st_mtime_ns == finished
    log = (second / "output.txt").read_bytes()[cut_off:].decode()
    resumed_at = int(re.search(r"Loaded checkpoint \S+/checkpoint_last.pt \(epoch \d+ @ (\d+) updates\)", log).group(1))
    done = [int(number) for number in re.findall(r'"num_updates": "(\d+)"', log)]
    assert SAVE_EVERY <= resumed_at < UPDATES and min(done) == resumed_at + 1 and max(done) == UPDATES

    results = json.loads((out / "results.json").read_text())
    assert [run["updates"] for run in results["runs"]] == [UPDATES, UPDATES]
    assert [(run["test"]["sentences"], run["test"]["score"] >= 0) for run in results["runs"]] == [(8, True)] * 2
