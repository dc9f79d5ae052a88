"""The auxiliary losses, compared with plain Python loops over tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import distributed as dist

from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope
from fairseq_sparsemixer.moe.gates.losses import balance_loss, cv_squared, masked_mean, masked_sum, router_z_loss


def balance_by_loops(probabilities, expert_index, padding, num_experts):
    real = [s for s in range(len(padding)) if not padding[s]]
    choices = [e for s in real for e in expert_index[s]]
    loss = 0.0
    for expert in range(num_experts):
        f = choices.count(expert) / len(choices) if choices else 0.0
        p = sum(probabilities[s][expert] for s in real) / len(real) if real else 0.0
        loss += f * p
    return num_experts * loss


@settings(max_examples=30)
@given(tokens=st.integers(0, 7), experts=st.integers(1, 5), k=st.integers(1, 2), seed=st.integers(0, 99))
def test_the_balance_loss_is_the_formula_over_non_padding_tokens(tokens, experts, k, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(tokens, experts, dtype=torch.float64, generator=generator).softmax(-1)
    expert_index = torch.randint(experts, (tokens, k), generator=generator)
    padding = torch.rand(tokens, generator=generator) < 0.4
    loss = balance_loss(probabilities, expert_index, padding)
    expected = balance_by_loops(probabilities.tolist(), expert_index.tolist(), padding.tolist(), experts)
    assert loss.item() == pytest.approx(expected)


def test_the_balance_loss_is_one_if_balanced_and_the_number_of_experts_if_collapsed():
    even = torch.full((8, 4), 0.25)
    assert balance_loss(even, torch.arange(8).remainder(4).unsqueeze(1)).item() == pytest.approx(1)
    collapsed = torch.zeros(8, 4).index_fill(1, torch.tensor([2]), 1.0)
    assert balance_loss(collapsed, torch.full((8, 1), 2)).item() == pytest.approx(4)


def test_the_balance_gradient_flows_only_through_the_mean_probability():
    probabilities = torch.rand(5, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    expert_index = torch.tensor([[0], [0], [1], [2], [0]])
    padding = torch.tensor([False, False, False, True, False])
    balance_loss(probabilities, expert_index, padding).backward()
    share = torch.tensor([3 / 4, 1 / 4, 0.0], dtype=torch.float64)
    expected = (3 * share / 4).expand(5, 3) * (~padding).unsqueeze(1)
    torch.testing.assert_close(probabilities.grad, expected)


def test_the_z_loss_is_the_mean_squared_log_partition():
    logits = torch.randn(6, 4, dtype=torch.float64)
    padding = torch.tensor([False, True, False, False, True, False])
    expected = [math.log(sum(math.exp(v) for v in row)) ** 2 for row, pad in zip(logits.tolist(), padding.tolist()) if not pad]
    assert router_z_loss(logits, padding).item() == pytest.approx(sum(expected) / 4)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_tokens_every_loss_and_its_gradient_are_zero(tokens):
    logits = torch.randn(tokens, 4, requires_grad=True)
    padding = torch.ones(tokens, dtype=torch.bool)
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    loss = balance_loss(logits.softmax(-1), index, padding) + router_z_loss(logits, padding)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_values_at_padding_never_matter():
    values = torch.tensor([[1.0], [float("nan")], [3.0], [float("inf")]])
    assert masked_mean(values, torch.tensor([False, True, False, True])).item() == 2


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_the_coefficient_of_variation_does_not_depend_on_the_scale(scale):
    values = scale * torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert cv_squared(values).item() == pytest.approx(3.5 / 9, rel=1e-5)  # variance 3.5, mean 3


SHARDS = [slice(0, 3), slice(3, 9)]  # the tokens of each rank


def tokens_of_all_ranks():
    """probabilities [9, 4], expert_index [9, 2], padding [9]."""
    generator = torch.Generator().manual_seed(4)
    probabilities = torch.rand(9, 4, dtype=torch.float64, generator=generator).softmax(-1)
    return probabilities, torch.randint(4, (9, 2), generator=generator), torch.arange(9) % 4 == 1


def losses_of_a_shard():
    """This rank's balance loss over the tokens of both ranks, its gradient, and its sum and mean of the probabilities."""
    probabilities, expert_index, padding = (tensor[SHARDS[dist.get_rank()]] for tensor in tokens_of_all_ranks())
    probabilities.requires_grad_()
    loss = balance_loss(probabilities, expert_index, padding, RanksScope(dist.group.WORLD))
    loss.backward()
    totals = [f(probabilities.detach(), padding, RanksScope(dist.group.WORLD)) for f in (masked_sum, masked_mean)]
    return loss.item(), probabilities.grad, *totals


@pytest.mark.distributed
def test_over_several_ranks_balance_and_its_gradient_use_the_tokens_of_all_ranks():
    probabilities, expert_index, padding = tokens_of_all_ranks()
    real = ~padding
    share = torch.bincount(expert_index[real].flatten(), minlength=4).double() / (2 * real.sum())
    for rank, (loss, grad, total, mean) in enumerate(run_ranks(2, losses_of_a_shard)):
        assert loss == pytest.approx(balance_by_loops(probabilities.tolist(), expert_index.tolist(), padding.tolist(), 4))
        expected = 2 * 4 * share / real.sum() * real[SHARDS[rank]].unsqueeze(1)  # of the losses of both ranks
        torch.testing.assert_close(grad, expected)
        torch.testing.assert_close(total, probabilities[real].sum(0))
        torch.testing.assert_close(mean, probabilities[real].mean(0))
