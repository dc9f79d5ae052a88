"""Outputs of experts back to their tokens."""

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
def test_each_token_gets_the_weighted_sum_of_its_rows_and_every_factor_its_gradient(k, scaled):
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


def test_half_precision_rows_leave_float32_gradients_to_weights_and_scale():
    weight = torch.rand(TOKENS, 1, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    decision = routing(1, weight, scale)
    pairs, _ = sort_pairs(decision)
    out = combine(torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16), decision, pairs, TOKENS)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == scale.grad.dtype == torch.float32
