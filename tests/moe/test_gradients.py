"""Gradients of sharded experts: sums, norm, overflow."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer.moe.gradients import add_expert_norm, reduce_expert_gradients, share_overflow
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group


def spread_model(group_size: int):
    model = nn.Sequential(nn.Linear(4, 4), build_moe_layer("switch", 4, 6, 4))
    ranks = form_expert_group(group_size)
    shard_experts(model, ranks)
    return model, ranks


def reduce_with_one_missing():
    """On four ranks with two replicas: one expert tensor has the gradient rank + 1, another has none."""
    model, ranks = spread_model(2)
    experts = model[1].experts
    experts.weight_in.grad = torch.full_like(experts.weight_in, dist.get_rank() + 1.0)
    reduce_expert_gradients(model, ranks)
    return experts.weight_in.grad.unique().tolist(), experts.bias_in.grad.abs().max().item()


@pytest.mark.distributed
def test_gradients_are_summed_over_replicas_and_divided_by_all_ranks():
    results = run_ranks(4, reduce_with_one_missing)
    assert [found for found, _ in results] == [[(1 + 3) / 4], [(2 + 4) / 4], [(1 + 3) / 4], [(2 + 4) / 4]]
    assert [missing for _, missing in results] == [0.0] * 4


def norm_of_ones():
    model, ranks = spread_model(2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    mine = sum(parameter.numel() for parameter in model.parameters() if not hasattr(parameter, "expert"))
    return add_expert_norm(torch.tensor(float(mine)).sqrt(), list(model.parameters()), ranks.group).item() ** 2


@pytest.mark.distributed
def test_each_expert_counts_once_in_the_gradient_norm():
    whole = nn.Sequential(nn.Linear(4, 4), build_moe_layer("switch", 4, 6, 4))
    count = sum(parameter.numel() for parameter in whole.parameters())
    for norm in run_ranks(4, norm_of_ones):  # two groups, so every expert has a replica that must not count
        assert round(norm, 3) == count


def overflow_on_one_rank(bad: float):
    model, ranks = spread_model(2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if dist.get_rank() == 1:
        model[1].experts.weight_out.grad[0, 0, 0] = bad
    share_overflow(model, ranks)
    return all(parameter.grad.isfinite().all() for parameter in model.parameters() if not hasattr(parameter, "expert"))


@pytest.mark.distributed
def test_all_ranks_see_an_overflow_in_one_ranks_expert():
    assert run_ranks(2, overflow_on_one_rank, float("inf")) == [False, False]
    assert run_ranks(2, overflow_on_one_rank, float("nan")) == [False, False]
    assert run_ranks(2, overflow_on_one_rank, 1.0) == [True, True]


def finite_gradients_after_sharing():
    """Whether sharing the overflow leaves gradients without one unchanged."""
    model, ranks = spread_model(2)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in model.parameters()]
    share_overflow(model, ranks)
    return all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before))


@pytest.mark.distributed
def test_without_an_overflow_no_gradient_changes():
    assert run_ranks(2, finite_gradients_after_sharing) == [True, True]
