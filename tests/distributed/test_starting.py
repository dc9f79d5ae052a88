"""Starting ranks with torchrun, SLURM and fairseq's own spawn, as detected by fairseq.

fairseq counts GPUs in all three cases, so the number of GPUs is faked. The ranks are real, and write the same
checkpoints as ranks started with explicit flags.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Dict
from unittest.mock import patch

import pytest
import runs
import torch
from ranks import free_port, rank_number, run_ranks

from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint

pytestmark = pytest.mark.distributed

BACKEND = "--distributed-world-size 2 --distributed-backend gloo --ddp-backend legacy_ddp".split()
SHARDS = ["checkpoint_last-rank-0.pt", "checkpoint_last-rank-1.pt"]  # two files exist only if experts are sharded


def train(data: Path, save_dir: Path, *flags, **options) -> None:
    runs.train(data, save_dir, "--sharded-checkpoints", *flags, updates=2, **options)


def flagged(data: Path, save_dir: Path, port: int) -> None:
    """A rank started with explicit flags."""
    train(data, save_dir, ranks=2, rank=rank_number(), port=port)


def detected(data: Path, save_dir: Path, variables: Dict[str, str], flags: list) -> None:
    """A rank configured by the variables of torchrun or SLURM; {rank} is replaced by its number."""
    with ExitStack() as feigned:
        own = {name: value.format(rank=rank_number()) for name, value in variables.items()}
        feigned.enter_context(patch.dict(os.environ, own))
        feigned.enter_context(patch("torch.cuda.device_count", return_value=2))
        feigned.enter_context(patch("torch.cuda.set_device"))
        feigned.enter_context(patch("subprocess.check_output", return_value=b"127.0.0.1\n"))  # scontrol show hostnames
        train(data, save_dir, *BACKEND, *flags)


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> Path:
    """The folder of ranks started with explicit flags."""
    save_dir = tmp_path_factory.mktemp("flagged")
    run_ranks(2, flagged, corpus, save_dir, free_port(), group=False)
    return save_dir


def assert_same_training(save_dir: Path, expected: Path) -> None:
    assert sorted(path.name for path in save_dir.glob("*.pt")) == SHARDS
    for shard in SHARDS:
        found, wanted = read_checkpoint(str(save_dir / shard)), read_checkpoint(str(expected / shard))
        assert found["optimizer_history"][-1]["num_updates"] == 2
        for name, value in runs.initialised(wanted["model"]).items():
            assert torch.equal(found["model"][name], value), name


def test_torchrun_starts_ranks(corpus, expected, tmp_path):
    variables = dict(RANK="{rank}", LOCAL_RANK="{rank}", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    run_ranks(2, detected, corpus, tmp_path, variables, [], group=False)
    assert_same_training(tmp_path, expected)


def test_srun_starts_ranks(corpus, expected, tmp_path):
    of_job = dict(SLURM_STEP_NODELIST="node1", SLURM_NNODES="1", SLURM_NTASKS="2")
    variables = dict(of_job, SLURM_PROCID="{rank}", SLURM_LOCALID="{rank}")
    run_ranks(2, detected, corpus, tmp_path, variables, ["--distributed-port", str(free_port())], group=False)
    assert_same_training(tmp_path, expected)


def test_fairseq_spawns_ranks(corpus, expected, tmp_path):
    with patch("torch.cuda.device_count", return_value=2):  # only in this process; the spawned ranks see no GPU
        train(corpus, tmp_path, *BACKEND)
    assert_same_training(tmp_path, expected)
