"""Combining expert outputs per token."""

import pytest
import torch

from fairseq_sparsemixer.moe.dispatch.combine import combine
from fairseq_sparsemixer.moe.dispatch.sorting import sort_pairs
from fairseq_sparsemixer.moe.gates import Routing

TOKENS, EXPERTS, WIDTH = 6, 3, 4


def routing(k, weight, scale, padding_mask=None):
    return Routing(
        expert_index=torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(TOKENS)]),
        combine_weight=weight,
        probabilities=torch.full((TOKENS, EXPERTS), 1 / EXPERTS),
        padding_mask=padding_mask,
        output_scale=scale,
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_each_token_gets_the_weighted_sum_of_its_rows_with_exact_gradients(k, scaled):
    mask = torch.arange(TOKENS) == 2
    scale = torch.randn(WIDTH, dtype=torch.float64, requires_grad=True) if scaled else None
    weight = torch.randn(TOKENS, k, dtype=torch.float64, requires_grad=True)
    decision = routing(k, weight, scale, mask)
    pairs, _ = sort_pairs(decision)
    rows = torch.randn(len(pairs), WIDTH, dtype=torch.float64, requires_grad=True)
    inputs = [tensor for tensor in (rows, weight, scale) if tensor is not None]

    expected = [torch.zeros(WIDTH, dtype=torch.float64) for _ in range(TOKENS)]
    for row, pair in enumerate(pairs.tolist()):
        token, choice = divmod(pair, k)
        expected[token] = expected[token] + weight[token, choice] * rows[row] * (1 if scale is None else scale)
    expected, out = torch.stack(expected), combine(rows, decision, pairs, TOKENS)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    for own, reference in zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)):
        torch.testing.assert_close(own, reference)


def test_half_precision_rows_give_float32_gradients_of_weights_and_scale():
    weight = torch.rand(TOKENS, 1, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    decision = routing(1, weight, scale)
    pairs, _ = sort_pairs(decision)
    out = combine(torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16), decision, pairs, TOKENS)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == scale.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_routers_gradient_is_summed_in_float32(dtype):
    rows, upstream = torch.randn(6, 4096).to(dtype), 100 * torch.randn(6, 4096).to(dtype)
    weight = torch.rand(6, 1, requires_grad=True)
    routing = Routing(torch.zeros(6, 1, dtype=torch.int64), weight, probabilities=torch.ones(6, 1))
    combine(rows, routing, torch.arange(6), 6).backward(upstream)
    exact = (rows.double() * upstream.double()).sum(-1, keepdim=True)
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-4, atol=1e-2)


def test_large_half_precision_gradients_do_not_overflow_in_the_router():
    rows, upstream = torch.full((2, 64), 100.0, dtype=torch.float16), torch.full((2, 64), 1740.0, dtype=torch.float16)
    weight = torch.rand(2, 1, requires_grad=True)
    routing = Routing(torch.zeros(2, 1, dtype=torch.int64), weight, probabilities=torch.ones(2, 1))
    combine(rows, routing, torch.arange(2), 2).backward(upstream)
    assert weight.grad.tolist() == [[64 * 100 * 1740.0]] * 2


def test_second_derivatives_are_refused_rather_than_wrong():
    weight = torch.rand(TOKENS, 1, requires_grad=True)
    decision = routing(1, weight, None)
    pairs, _ = sort_pairs(decision)
    out = combine(torch.randn(TOKENS, WIDTH), decision, pairs, TOKENS)
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()
