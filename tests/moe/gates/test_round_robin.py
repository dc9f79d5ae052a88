"""Round robin, compared with a counter over the tokens."""

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.round_robin import round_robin_routing


@pytest.mark.parametrize("experts, k", [(4, 1), (4, 3), (5, 2), (3, 3)])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_experts_take_the_tokens_that_are_not_padding_in_turn(experts, k, share):
    padding = torch.rand(23) < share
    routing = round_robin_routing(torch.randn(23, experts, dtype=torch.float64), padding if share else None, k)
    served = 0
    for token, pad in enumerate(padding.tolist()):
        if pad:
            assert routing.combine_weight[token].tolist() == [0] * k
            continue
        expected = [(served * k + choice) % experts for choice in range(k)]
        assert routing.expert_index[token].tolist() == expected
        assert routing.combine_weight[token].tolist() == [1 / k] * k
        assert routing.probabilities[token].tolist() == [1 / k if e in expected else 0 for e in range(experts)]
        served += 1
    load = routing.statistics()["load"].sum(0)
    assert load.max() - load.min() <= 1 and load.sum() == served * k


def test_a_capacity_of_the_fair_share_drops_nothing():
    gate = build_gate("round_robin", 6, 4, top_k=2, capacity_factor=1.0)
    routing = gate(torch.randn(21, 6), torch.arange(21) % 3 == 0)
    assert routing.dropped is not None and not routing.dropped.any()


def test_nothing_is_learned_the_projection_is_saved_and_the_gate_depends_on_the_batch():
    gate = build_gate("round_robin", 6, 4)
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert gate(torch.randn(5, 6)).aux_losses == {}
    assert "projection.weight" in gate.state_dict() and not gate.causal
