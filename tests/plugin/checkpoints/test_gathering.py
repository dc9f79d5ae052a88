"""gathering.py: this rank's slices of a checkpoint's optimizer state. tests/distributed gathers them from ranks."""

from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import distributed as dist

from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices
from fairseq_sparsemixer.plugin.checkpoints.gathering import keep_slices

SHAPES = {1: torch.Size([2, 3]), 4: torch.Size([2, 2])}


def keep_second_half(entries):
    with patch.object(dist, "get_rank", lambda group: 1):
        slices = ReplicaSlices([], SimpleNamespace(replicas=None, num_replicas=2))
    state = {"model": {}, "last_optimizer_state": {"state": entries, "param_groups": [{"lr": 1}]}}
    kept = keep_slices(state, SHAPES, slices)
    assert {**kept, "last_optimizer_state": {**kept["last_optimizer_state"], "state": entries}} == state
    return kept["last_optimizer_state"]["state"]


def test_moments_of_experts_become_slices_and_all_else_stays():
    moment, other = torch.arange(6).view(2, 3), torch.arange(6).view(2, 3)
    kept = keep_second_half({0: {"exp_avg": other, "step": 5}, 1: {"exp_avg": moment, "step": 5, "scale": torch.tensor(2.0)}})
    assert kept[1]["exp_avg"].tolist() == [3, 4, 5] and kept[1]["step"] == 5 and kept[1]["scale"] == 2
    assert kept[0] == {"exp_avg": other, "step": 5} and moment.shape == (2, 3)


def test_moments_of_other_shapes_stay_so_that_they_are_refused():
    transposed = torch.zeros(3, 2)
    assert keep_second_half({1: {"exp_avg": transposed}})[1]["exp_avg"] is transposed


def test_a_checkpoint_without_optimizer_state_stays():
    state = {"model": {}, "last_optimizer_state": None}
    assert keep_slices(state, SHAPES, ReplicaSlices) is state
