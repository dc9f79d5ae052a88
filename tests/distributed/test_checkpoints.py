"""Checkpoints of runs whose experts are spread over ranks: fairseq-train on real ranks, stopped and resumed."""

import os
import shutil
import socket
from pathlib import Path
from typing import Any, Dict, List

import pytest
import runs
import torch
from ranks import collect, start_ranks

from fairseq_sparsemixer.checkpoints import read_checkpoint

BEFORE, AFTER = 3, 5  # updates: where the run stops, and where the resumed one does
FLAGS = ("--store-ema", "--ema-fp32", "--ema-decay", "0.9")


def train_one_rank(log: Path, data: Path, save_dir: Path, flags: tuple, options: Dict[str, Any]) -> List[float]:
    with open(log, "a") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
        return runs.train(data, save_dir, *flags, **options)


def train(data: Path, save_dir: Path, *flags, updates: int, ranks: int) -> List[float]:
    """fairseq-train on that many ranks; the losses of its updates. Raises AssertionError with what rank 0 fails with."""
    save_dir.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        options = dict(updates=updates, ranks=ranks, rank=rank, port=port)
        started += start_ranks(1, train_one_rank, save_dir / f"log.{rank}", data, save_dir, flags, options, group=False)
    return collect(started, deadline=100)[0]


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> List[float]:
    """The losses of a run on two ranks that nothing interrupts."""
    return train(corpus, tmp_path_factory.mktemp("whole") / "run", *FLAGS, updates=AFTER, ranks=2)


@pytest.fixture(scope="module")
def portable(corpus, tmp_path_factory) -> Path:
    """A checkpoint that two ranks wrote after BEFORE updates, each of them holding half of the experts."""
    save_dir = tmp_path_factory.mktemp("stopped") / "run"
    train(corpus, save_dir, *FLAGS, updates=BEFORE, ranks=2)
    return save_dir / "checkpoint_last.pt"


def resume(corpus: Path, checkpoint: Path, save_dir: Path, *flags, ranks: int) -> List[float]:
    return train(corpus, save_dir, "--restore-file", str(checkpoint), *FLAGS, *flags, updates=AFTER, ranks=ranks)


def test_two_ranks_resume_where_two_ranks_stopped(corpus, portable, whole, tmp_path):
    assert resume(corpus, portable, tmp_path / "run", ranks=2) == whole[BEFORE:]


def test_one_process_resumes_where_two_ranks_stopped(corpus, portable, whole, tmp_path):
    losses = resume(corpus, portable, tmp_path / "run", "--update-freq", "2", ranks=1)
    torch.testing.assert_close(losses, whole[BEFORE:], rtol=1e-6, atol=0)


def test_ranks_without_shared_experts_resume_where_two_ranks_stopped(corpus, portable, whole, tmp_path):
    losses = resume(corpus, portable, tmp_path / "run", "--expert-parallel-size", "1", ranks=2)
    torch.testing.assert_close(losses, whole[BEFORE:], rtol=1e-6, atol=0)


def test_the_checkpoint_is_what_one_process_would_have_written(corpus, portable, tmp_path):
    losses = train(corpus, tmp_path / "run", *FLAGS, "--update-freq", "2", updates=BEFORE, ranks=1)
    assert len(losses) == BEFORE
    alone, spread = read_checkpoint(tmp_path / "run" / "checkpoint_last.pt"), read_checkpoint(portable)
    for state in (alone, spread):
        for weights in (state["model"], state["extra_state"]["ema"], state["extra_state"]["ema_fp32_params"]):
            for name in [name for name in weights if name.endswith("k_proj.bias")]:
                del weights[name]  # softmax cancels it: Adam follows the rounding of a gradient that is zero
    for part in ("model", "last_optimizer_state"):
        torch.testing.assert_close(dict(spread[part]), dict(alone[part]), rtol=1e-4, atol=1e-5)
    for part in ("ema", "ema_fp32_params"):
        torch.testing.assert_close(dict(spread["extra_state"][part]), dict(alone["extra_state"][part]), rtol=1e-4, atol=1e-5)
    assert spread["expert_parallel"] == alone["expert_parallel"]
    paths = {"spread": portable, "alone": tmp_path / "run" / "checkpoint_last.pt"}
    words = {name: [line.split("\t")[2] for line in runs.generate(corpus, path, tmp_path / name)] for name, path in paths.items()}
    assert words["spread"] == words["alone"]


def test_without_optimizer_state_a_checkpoint_still_starts_another_run(corpus, tmp_path):
    train(corpus, tmp_path / "run", "--no-save-optimizer-state", updates=1, ranks=2)
    checkpoint = tmp_path / "run" / "checkpoint_last.pt"
    assert "last_optimizer_state" not in read_checkpoint(str(checkpoint))
    for name, flags in (("tuned", ["--finetune-from-model"]), ("reset", ["--reset-optimizer", "--restore-file"])):
        losses = train(corpus, tmp_path / name, *flags, str(checkpoint), updates=2, ranks=1)
        assert losses


def test_two_ranks_resume_a_model_without_experts(corpus, tmp_path):
    flags = ("--router", "dense")
    losses = train(corpus, tmp_path / "run", *flags, updates=AFTER, ranks=2)
    train(corpus, tmp_path / "stopped", *flags, updates=BEFORE, ranks=2)
    assert train(corpus, tmp_path / "stopped", *flags, updates=AFTER, ranks=2) == losses[BEFORE:]


def test_sharded_checkpoints_resume_on_the_same_layout_and_on_no_other(corpus, whole, tmp_path):
    run = tmp_path / "run"
    train(corpus, run, *FLAGS, "--sharded-checkpoints", updates=BEFORE, ranks=2)
    assert sorted(path.name for path in run.glob("*.pt*")) == ["checkpoint_last-rank-0.pt", "checkpoint_last-rank-1.pt"]
    layouts = [read_checkpoint(run / f"checkpoint_last-rank-{rank}.pt")["expert_parallel"] for rank in range(2)]
    assert [(layout["size"], layout["index"]) for layout in layouts] == [(2, 0), (2, 1)]
    assert layouts[0]["save"] == layouts[1]["save"] is not None

    shutil.copytree(run, tmp_path / "other")
    assert train(corpus, run, *FLAGS, "--sharded-checkpoints", updates=AFTER, ranks=2) == whole[BEFORE:]
    with pytest.raises(AssertionError, match="is a sharded checkpoint .* fairseq-sparsemixer reshard .* --portable"):
        train(corpus, tmp_path / "other", *FLAGS, updates=AFTER, ranks=1)
