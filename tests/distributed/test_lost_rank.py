"""If one rank dies or hangs during training, the others exit with an error, and training resumes from the last checkpoint."""

import os
import signal
from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

import pytest
import torch
from ranks import collect, meeting_place, rank_number, run_ranks, start_ranks
from runs import EXPERTS, SMALL, make_corpus, run

from fairseq_sparsemixer.cli.launch import rank_command
from fairseq_sparsemixer.plugin.trainer import MoETrainer

pytestmark = pytest.mark.distributed

USER_DIR = Path(__file__).resolve().parent.parent.parent / "fairseq_sparsemixer"


def train(data: Path, save_dir: Path, meeting: str, fate: int = 0, *flags: str) -> Dict[str, Any]:
    """Run fairseq-train for 12 updates on two ranks, saving every third; rank 1 gets the signal `fate` after seven."""
    import fairseq_cli.train

    trainers: List[MoETrainer] = []
    start, step = MoETrainer.__init__, MoETrainer.train_step

    def remembered(self, *args):
        start(self, *args)
        trainers.append(self)

    def fatal(self, *args):
        if fate and self.get_num_updates() == 7 and self.data_parallel_rank == 1:
            os.kill(os.getpid(), fate)
        return step(self, *args)

    command = [
        "fairseq-train", data, "--user-dir", USER_DIR, *SMALL, *EXPERTS, "--required-batch-size-multiple", "1",
        "--save-dir", save_dir, "--save-interval-updates", "3", "--max-update", "12", "--no-progress-bar", *flags,
    ]  # fmt: skip
    with patch.multiple(MoETrainer, __init__=remembered, train_step=fatal):
        try:
            run(fairseq_cli.train.cli_main, *rank_command([str(word) for word in command], rank_number(), 2, meeting)[1:])
        except SystemExit as end:
            return {"exit": str(end)}
    return {name: parameter.detach().clone() for name, parameter in trainers[0].get_model().named_parameters()}


def test_after_a_killed_rank_the_others_exit_and_the_resumed_run_ends_the_same(tmp_path):
    data = make_corpus(tmp_path, sentences=24)  # several epochs: the run resumes in a later one
    straight = run_ranks(2, train, data, tmp_path / "straight", meeting_place(), group=False)
    ranks = start_ranks(2, train, data, tmp_path / "cut", meeting_place(), signal.SIGKILL, group=False)
    (survivor,) = collect(ranks[:1], deadline=60)
    ranks[1].process.join()
    assert ranks[1].process.exitcode == -signal.SIGKILL
    assert "rank 0 lost contact with another rank" in survivor["exit"]
    assert f"resume from {tmp_path}/cut/checkpoint_last.pt" in survivor["exit"]
    resumed = run_ranks(2, train, data, tmp_path / "cut", meeting_place(), group=False)
    for found, expected in zip(resumed, straight):
        for name, parameter in expected.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", ["2", "1"])
def test_if_a_rank_hangs_the_others_exit_within_the_timeout(group_size, tmp_path):
    data = make_corpus(tmp_path, sentences=20)
    # torch's own timeout is half an hour
    flags = "--collective-timeout", "3", "--no-save", "--expert-parallel-size", group_size
    ranks = start_ranks(2, train, data, tmp_path / "run", meeting_place(), signal.SIGSTOP, *flags, group=False)
    try:
        (survivor,) = collect(ranks[:1], deadline=60)
        assert "rank 0 lost contact with another rank" in survivor["exit"]
    finally:
        ranks[1].process.kill()
        ranks[1].process.join()
