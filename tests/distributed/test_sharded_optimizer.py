"""--shard-expert-optimizer: fairseq-train with slices of the experts' optimizer state, compared with training without.

Where experts are on several ranks anyway, and in half precision, updates are the same to the last bit. Otherwise gradients
are divided by the number of ranks after, not before, they are scaled, and clipping sums slices instead of whole tensors.
"""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

import pytest
import torch
from ranks import meeting_place, rank_number, run_ranks
from runs import make_corpus
from test_checkpoints import train as save_and_resume
from test_fairseq_train import assert_same, train

from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard
from fairseq_sparsemixer.plugin.trainer import MoETrainer

pytestmark = pytest.mark.distributed

SHARD = "--shard-expert-optimizer"
SHORT = ("--max-update", "3", "--disable-validation")


def train_and_count(data: Path, world_size: int, meeting: str, flags: List[str]) -> Dict[str, Any]:
    """test_fairseq_train's result; `state`: the numbers that this rank keeps as first moments of the marked experts."""
    state = []

    def count(self, *args):
        output = stepped(self, *args)
        moments = self.optimizer.optimizer.state
        state[:] = [moments[p]["exp_avg"].numel() for p in self.optimizer.params if hasattr(p, "expert")]
        return output

    stepped = MoETrainer.train_step
    with patch.object(MoETrainer, "train_step", count):
        result = train(data, world_size, meeting, rank_number(), *flags)
    return {**result, "state": sum(state)}


def runs(data: Path, world_size: int, *flags: str) -> List[Dict[str, Any]]:
    return run_ranks(world_size, train_and_count, data, world_size, meeting_place(), list(flags), group=False)


def assert_same_runs(found: List[Dict[str, Any]], expected: List[Dict[str, Any]], tolerance: float) -> None:
    """Each rank's norms and parameters are those expected; all ranks have the same norms, and replicas the same experts."""
    assert [result["exit"] for result in (*found, *expected)] == [None] * 2 * len(found)
    assert len({tuple(result["norms"]) for result in found}) == 1
    assert found[0]["norms"] == pytest.approx(expected[0]["norms"], rel=1e-6) and len(found[0]["norms"]) == 3
    for one, other in zip(found, expected):
        for kind in {"parameters", "ema"} & one.keys():
            pairs = ({name: tensor for name, (_, tensor) in run[kind].items()} for run in (one, other))
            assert_same(*pairs, tolerance=tolerance, least=1e-7 if tolerance else 0)
    for one, other in combinations(found, 2):
        for name, (place, tensor) in one["parameters"].items():
            assert place != other["parameters"][name][0] or torch.equal(tensor, other["parameters"][name][1])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 sentences: 5 batches of 4, so that in the last update the second of two ranks has no batch."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), sentences=20)


EXPERTS = 3 * 4 * (2 * 16 * 24 + 24 + 16)  # numbers in three layers of four experts


@pytest.mark.parametrize(
    "flags, numbers, tolerance",
    [
        ("--clip-norm 0.1", EXPERTS, 1e-5),
        ("--clip-norm 0.1 --ddp-backend pytorch_ddp --update-freq 2 --checkpoint-experts", EXPERTS, 1e-5),
        (r"--clip-norm 0.1 --freeze ^(?!.*\.experts\.)", EXPERTS, 1e-5),  # fairseq would take the norm for zero
        ("--clip-norm 0 --bf16 --use-old-adam", EXPERTS, 0),
        ("--clip-norm 0 --memory-efficient-bf16 --ddp-backend pytorch_ddp", EXPERTS, 0),
        ("--clip-norm 0 --fp16 --fp16-init-scale 4 --store-ema --ema-fp32", EXPERTS, 0),
        ("--clip-norm 0.1 --expert-lora-rank 2 --freeze embed_tokens", 3 * 4 * 2 * 2 * (16 + 24), 1e-5),
    ],
)
def test_two_replicas_equal_whole_updates(flags, numbers, tolerance, data):
    flags = [*SHORT, "--expert-parallel-size", "1", *flags.split()]
    found = runs(data, 2, *flags, SHARD)
    assert_same_runs(found, runs(data, 2, *flags), tolerance)
    assert [result["state"] for result in found] == [numbers // 2] * 2


@pytest.mark.parametrize("flags", ["--clip-norm 0", "--clip-norm 0.1 --ddp-backend pytorch_ddp"])
def test_two_groups_of_two_ranks_equal_whole_updates(flags, data):
    flags = [*SHORT, "--num-experts", "2", *flags.split()]
    found, expected = runs(data, 4, *flags, SHARD), runs(data, 4, *flags)
    assert_same_runs(found, expected, tolerance=1e-5 if "0.1" in flags else 0)
    assert [result["state"] for result in (*found, *expected)] == [EXPERTS // 8] * 4 + [EXPERTS // 4] * 4


BEFORE, AFTER = 3, 5  # updates of the checkpoint from which runs resume, and at which they stop
RUN = ("--store-ema", "--ema-fp32", "--ema-decay", "0.9", "--save-interval-updates", str(BEFORE), "--num-experts", "2")
CHECKPOINT = f"checkpoint_1_{BEFORE}.pt"
ON_TWO = (*RUN, "--expert-parallel-size", "1")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=0)


def save(corpus: Path, save_dir: Path, *flags: str, ranks: int) -> Dict[str, Any]:
    """A run of AFTER updates: its losses, and its checkpoint after BEFORE updates."""
    return {"losses": save_and_resume(corpus, save_dir, *flags, updates=AFTER, ranks=ranks), "path": save_dir / CHECKPOINT}


def resume(corpus: Path, path: Path, save_dir: Path, *flags: str, ranks: int) -> List[float]:
    return save_and_resume(corpus, save_dir, "--restore-file", str(path), *flags, updates=AFTER, ranks=ranks)


@pytest.fixture(scope="module")
def sliced(corpus, tmp_path_factory) -> Dict[str, Any]:
    return save(corpus, tmp_path_factory.mktemp("sliced") / "run", *ON_TWO, SHARD, ranks=2)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory) -> Dict[str, Any]:
    return save(corpus, tmp_path_factory.mktemp("plain") / "run", *ON_TWO, ranks=2)


def test_the_checkpoint_is_that_of_a_run_without_slices(sliced, plain):
    found, expected = (read_checkpoint(run["path"]) for run in (sliced, plain))
    assert found["expert_parallel"] == expected["expert_parallel"] and found.keys() == expected.keys()
    close(found["last_optimizer_state"], expected["last_optimizer_state"], rtol=1e-4, atol=1e-6)
    for state in (found, expected):
        for name in [name for name in state["model"] if name.endswith(("k_proj.bias", "_float_tensor"))]:
            del state["model"][name]  # rounding error, and what fairseq does not initialise
    close(dict(found["model"]), dict(expected["model"]), rtol=1e-4, atol=1e-6)


def test_slices_resume_from_slices_as_if_not_stopped(corpus, sliced, tmp_path):
    assert resume(corpus, sliced["path"], tmp_path / "run", *ON_TWO, SHARD, ranks=2) == sliced["losses"][BEFORE:]


@pytest.mark.parametrize(
    "flags, ranks",
    [((*RUN, "--expert-parallel-size", "2"), 2), ((*RUN, SHARD, "--update-freq", "2"), 1)],
    ids=["experts on two ranks", "one process"],
)
def test_runs_without_slices_resume_from_slices(flags, ranks, corpus, sliced, tmp_path):
    close(resume(corpus, sliced["path"], tmp_path / "run", *flags, ranks=ranks), sliced["losses"][BEFORE:])


def test_slices_resume_from_a_run_without_slices(corpus, plain, tmp_path):
    close(resume(corpus, plain["path"], tmp_path / "run", *ON_TWO, SHARD, ranks=2), plain["losses"][BEFORE:])


def test_sharded_checkpoints_of_slices_resume_and_become_one_file(corpus, tmp_path):
    flags = (*RUN, "--sharded-checkpoints", SHARD)
    four = save(corpus, tmp_path / "run", *flags, ranks=4)
    assert resume(corpus, four["path"], tmp_path / "again", *flags, ranks=4) == four["losses"][BEFORE:]
    reshard(str(four["path"]), str(tmp_path / "one.pt"), 1)
    close(resume(corpus, tmp_path / "one.pt", tmp_path / "alone", *RUN, "--update-freq", "4", ranks=1), four["losses"][BEFORE:])
