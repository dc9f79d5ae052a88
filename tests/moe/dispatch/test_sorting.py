"""Sorting token-expert pairs by expert, compared with plain Python lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.moe.dispatch.sorting import gather, scatter_rows, sort_pairs
from fairseq_sparsemixer.moe.gates import Routing


def make_routing(expert_index, num_experts, padding=None, dropped=None):
    probabilities = torch.full((len(expert_index), num_experts), 1 / num_experts)
    return Routing(
        expert_index, torch.ones(expert_index.shape), probabilities=probabilities, padding_mask=padding, dropped=dropped
    )


@settings(max_examples=50)
@given(tokens=st.integers(0, 8), experts=st.integers(1, 5), k=st.integers(1, 3), seed=st.integers(0, 99),
       padding=st.booleans(), dropping=st.booleans())  # fmt: skip
def test_routed_pairs_are_grouped_by_expert_in_stable_order(tokens, experts, k, seed, padding, dropping):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(experts, (tokens, k), generator=generator)
    mask = torch.rand(tokens, generator=generator) < 0.4 if padding else None
    dropped = torch.rand(tokens, k, generator=generator) < 0.4 if dropping else None
    pairs, counts = sort_pairs(make_routing(index, experts, mask, dropped))
    by_expert = [
        [
            s * k + j
            for s in range(tokens)
            for j in range(k)
            if index[s, j] == expert and not (padding and mask[s]) and not (dropping and dropped[s, j])
        ]
        for expert in range(experts)
    ]
    assert pairs.tolist() == [pair for group in by_expert for pair in group]
    assert counts == [len(group) for group in by_expert]


def test_sorting_with_all_tokens_on_one_expert_and_with_only_padding():
    index = torch.full((5, 1), 2)
    assert sort_pairs(make_routing(index, 4)).counts == [0, 0, 5, 0]
    pairs, counts = sort_pairs(make_routing(index, 4, padding=torch.ones(5, dtype=torch.bool)))
    assert counts == [0, 0, 0, 0] and pairs.numel() == 0


def test_gather_gives_each_pair_its_token_and_scatter_sums_a_tokens_pairs():
    tokens = torch.randn(4, 3)
    pairs = torch.tensor([7, 0, 2, 5, 1])  # of 4 tokens with k = 2; pairs 3, 4, 6 are not routed
    rows = gather(tokens, pairs, 2)
    torch.testing.assert_close(rows, tokens[[3, 0, 1, 2, 0]])
    back = scatter_rows(rows, pairs, 4, 2)
    torch.testing.assert_close(back, tokens * torch.tensor([[2.0], [1.0], [1.0], [1.0]]))


def test_gather_and_scatter_gradients_match_finite_differences():
    tokens = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    pairs = torch.tensor([5, 0, 1, 3])
    assert torch.autograd.gradcheck(lambda t: gather(t, pairs, 2), (tokens,))
    assert torch.autograd.gradcheck(lambda r: scatter_rows(r, pairs, 3, 2), (rows,))
    assert torch.autograd.gradcheck(lambda t: gather(t, pairs[2:] // 2, 1), (tokens,))
