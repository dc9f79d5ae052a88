"""Dispatch in one process, compared with a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.moe.dispatch import dispatch_locally
from fairseq_sparsemixer.moe.gates import Routing


def affine_experts(scales):
    """Expert e multiplies by scales[e] and adds e: (function on rows grouped by expert, function of expert and token)."""

    def grouped(rows, counts):
        expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
        return rows * scales[expert].unsqueeze(1) + expert.to(rows.dtype).unsqueeze(1)

    return grouped, lambda expert, token: token * scales[expert] + expert


@settings(max_examples=40)
@given(tokens=st.integers(0, 7), experts=st.integers(1, 4), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_token_gets_the_weighted_sum_of_its_routed_experts(tokens, experts, k, seed):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    x, weight = rand(tokens, 3), rand(tokens, k)
    routing = Routing(
        torch.randint(experts, (tokens, k), generator=generator), weight, probabilities=rand(tokens, experts),
        padding_mask=rand(tokens) < 0.3, dropped=rand(tokens, k) < 0.2,
    )  # fmt: skip
    grouped, expert_of = affine_experts(rand(experts))
    expected = torch.zeros_like(x)
    for s in range(tokens):
        for j in range(k):
            if not routing.padding_mask[s] and not routing.dropped[s, j]:
                expected[s] += weight[s, j] * expert_of(routing.expert_index[s, j].item(), x[s])
    torch.testing.assert_close(dispatch_locally(x, routing, grouped), expected)


def test_gradients_of_tokens_and_weights_are_exact():
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 1]])
    padding = torch.tensor([False, False, True, False])
    grouped, _ = affine_experts(torch.randn(3, dtype=torch.float64))

    def run(x, weight):
        return dispatch_locally(x, Routing(index, weight, probabilities=torch.zeros(4, 3), padding_mask=padding), grouped)

    assert torch.autograd.gradcheck(run, (x, weight))
