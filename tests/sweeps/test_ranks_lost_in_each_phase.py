"""Ranks killed or stopped in every phase of training: the others exit with a one-line error, and no process is left.

The deadline of `collect` is the timeout plus a margin for a busy machine. Run with `python -m pytest -m sweep`.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator, List
from unittest.mock import patch

import pytest
from ranks import collect, meeting_place, rank_number, start_ranks
from runs import EXPERTS, SMALL, run

from fairseq_sparsemixer.cli.launch import rank_command
from fairseq_sparsemixer.plugin import lost_ranks
from fairseq_sparsemixer.plugin.trainer import MoETrainer

pytestmark = pytest.mark.sweep

TIMEOUT, MARGIN = 8, 60
USER_DIR = Path(lost_ranks.__file__).parents[1]
FLAGS = [
    *(flag for flag in SMALL if flag != "--disable-validation"), *EXPERTS, "--required-batch-size-multiple", "1",
    "--no-progress-bar", "--max-update", "4", "--save-interval-updates", "2", "--collective-timeout", str(TIMEOUT),
]  # fmt: skip
PHASES = {  # where a rank gets its signal: before the n-th call of a function
    "rendezvous": (lost_ranks, "fairseq_init", 1),
    "start": (MoETrainer, "__init__", 1),
    "load": (MoETrainer, "load_checkpoint", 1),
    "step": (MoETrainer, "train_step", 2),
    "reduction": (MoETrainer, "clip_grad_norm", 2),
    "gathering": (MoETrainer, "consolidate_optimizer", 1),
    "save": (MoETrainer, "save_checkpoint", 1),
    "validate": (MoETrainer, "valid_step", 1),
    "end": (MoETrainer, "lr_step", 1),
}
SPREADS = {
    "spread": ["--expert-parallel-size", "2"],
    "whole": ["--expert-parallel-size", "1"],
    "sharded": ["--sharded-checkpoints"],
}


@contextmanager
def fate_at(phase: str, number: int) -> Iterator[None]:
    """Send this process the signal when it reaches the phase."""
    owner, name, count = PHASES[phase]
    function, calls = getattr(owner, name), []

    def fatal(*args: Any, **kwargs: Any):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    with patch.object(owner, name, fatal):
        yield


def train(data: Path, save_dir: Path, meeting: str, phase: str, number: int, victim: int, *flags: str) -> str:
    """Run fairseq-train on one of two ranks. Returns "done" or its error."""
    import fairseq_cli.train

    rank = rank_number()
    command = ["fairseq-train", str(data), "--user-dir", str(USER_DIR), *FLAGS, "--save-dir", str(save_dir), *flags]
    with fate_at(phase, number if rank == victim else 0):  # signal 0 does nothing
        try:
            run(fairseq_cli.train.cli_main, *rank_command(command, rank, 2, meeting)[1:])
        except SystemExit as end:
            return str(end)
    return "done"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("phase", PHASES)
def test_the_other_rank_exits_with_a_one_line_error(phase, spread, number, victim, corpus, tmp_path):
    if phase == "save" and spread != "sharded" and victim == 1:
        pytest.skip("only rank 0 writes")
    ranks = start_ranks(2, train, corpus, tmp_path, meeting_place(), phase, number, victim, *SPREADS[spread], group=False)
    try:
        (sentence,) = collect([ranks[1 - victim]], TIMEOUT + MARGIN)
        assert re.fullmatch(rf"fairseq-sparsemixer: rank {1 - victim} lost contact with another rank \(.+\); restart.*", sentence)
        assert number == signal.SIGSTOP or not ranks[victim].process.is_alive()
    finally:
        ranks[victim].process.kill()
        ranks[victim].process.join()


def children(process: int) -> List[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True).stdout
    return [int(word) for word in listed.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="counts processes with ps")
@pytest.mark.parametrize("seed", range(8))
def test_launch_leaves_no_process_behind(seed, corpus, tmp_path):
    draw = random.Random(seed)
    number, group_size = draw.choice([signal.SIGSTOP, signal.SIGKILL]), draw.choice(["1", "2"])
    command = [
        sys.executable, "-m", "fairseq_cli.train", str(corpus), "--user-dir", str(USER_DIR), *FLAGS, "--max-update", "100000",
        "--save-dir", str(tmp_path / "run"), "--expert-parallel-size", group_size,
    ]  # fmt: skip
    output = (tmp_path / "output").open("w+")
    launcher = subprocess.Popen(
        [sys.executable, "-m", "fairseq_sparsemixer", "launch", "--nproc", "2", "--grace", "20", "--", *command],
        stdout=output, stderr=output,
    )  # fmt: skip
    try:
        while len(children(launcher.pid)) < 2:
            time.sleep(0.05)
        ranks = children(launcher.pid)
        time.sleep(draw.uniform(0, 25))  # during imports, rendezvous or training, depending on the machine
        victim = draw.choice(ranks)
        os.kill(victim, number)
        status = launcher.wait(timeout=TIMEOUT + 2 * MARGIN)
    finally:
        launcher.kill()
        launcher.wait()
    output.seek(0)
    text = output.read()
    assert status != 0 and "Traceback" not in text, text
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    assert number == signal.SIGKILL or text.count("lost contact with another rank") == 1, text
