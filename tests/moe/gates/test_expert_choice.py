"""Expert choice, compared with each expert's top tokens by the formulas of arXiv 2202.09368."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates.expert_choice import expert_choice_routing


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(1, 5), st.sampled_from([0.5, 1.0, 2.0, 9.0]), st.integers(0, 10**6), st.data())
def test_each_expert_takes_its_most_probable_tokens(tokens, num_experts, factor, seed, data):
    logits = torch.randn(tokens, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    padding = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    routing = expert_choice_routing(logits, torch.tensor(padding), factor)
    pi = [softmax(row) for row in logits.tolist()]
    real = [s for s in range(tokens) if not padding[s]]
    capacity = min(math.ceil(factor * len(real) / num_experts), len(real))
    expected = torch.zeros(tokens, num_experts, dtype=torch.float64)
    for e in range(num_experts):
        for s in sorted(real, key=lambda s: -pi[s][e])[:capacity]:
            expected[s, e] = pi[s][e]
    weights = torch.zeros_like(expected).scatter(1, routing.expert_index, routing.combine_weight)
    torch.testing.assert_close(weights, expected)
    sums = routing.statistics()
    assert sums["load"].tolist() == [[capacity] * num_experts]
    assert sums["dropped"].item() == sum(expected[s].sum().item() == 0 for s in real)


def test_the_layers_output_is_the_sum_over_the_experts_that_chose_a_token():
    layer = build_moe_layer("expert_choice", 6, 8, 3, capacity_factor=1.0).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    y = layer(x)
    weights = torch.zeros(9, 3, dtype=torch.float64).scatter(1, layer.routing.expert_index, layer.routing.combine_weight)
    expected = sum(weights[:, e : e + 1] * layer.experts(x, [9 * (i == e) for i in range(3)]) for e in range(3))
    torch.testing.assert_close(y, expected)
    assert layer.gate.experts_per_token == 1.0


def test_the_weights_gradient_is_that_of_the_softmax():
    logits = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: expert_choice_routing(x, None, 1.5).combine_weight, logits)


def test_the_gate_is_not_causal_because_later_tokens_change_the_weights():
    gate = build_gate("expert_choice", 6, 2, capacity_factor=1.0)
    assert not gate.causal
    logits = torch.tensor([[1.0, 0.0], [0.9, 0.0]])
    later = torch.cat([logits, torch.tensor([[3.0, -3.0], [3.0, -3.0], [3.0, -3.0]])])
    assert gate.route(logits).combine_weight[0].sum() != gate.route(later).combine_weight[0].sum()


@pytest.mark.parametrize("factor", [0, -1.0])
def test_capacity_factor_must_be_positive(factor):
    with pytest.raises(ValueError, match="capacity_factor=.* must be positive"):
        build_gate("expert_choice", 6, 2, capacity_factor=factor)
