"""Shared experts, which run on every token."""

import pytest
import torch

from fairseq_sparsemixer import build_moe_layer


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_shared_experts_are_added_unweighted_to_every_non_padding_token(activation):
    layer = build_moe_layer("switch", 6, 8, 4, activation=activation, num_shared_experts=3).double().eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    output = layer(x, padding)
    shared, layer.shared_experts = layer.shared_experts, None
    routed = layer(x, padding)
    weights = {name: p[0] for name, p in shared.named_parameters()}

    def one(columns):  # one of the three, extracted from the joint network; the output bias counts once
        gate_and_linear = (x @ weights["weight_in"] + weights["bias_in"]).chunk(2 if shared.gated else 1, -1)
        hidden = [part[..., columns] for part in gate_and_linear]
        act = torch.nn.functional.silu if shared.gated else torch.relu
        hidden = act(hidden[0]) * hidden[1] if shared.gated else act(hidden[0])
        return hidden @ weights["weight_out"][columns]

    always = sum(one(slice(8 * i, 8 * i + 8)) for i in range(3)) + weights["bias_out"]
    torch.testing.assert_close(output, routed + always.masked_fill(padding.unsqueeze(-1), 0))
    assert (output[padding] == 0).all()


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match="num_shared_experts=-1 must not be negative"):
        build_moe_layer("switch", 6, 8, 4, num_shared_experts=-1)


def test_shared_experts_are_one_network_of_their_total_width():
    shared = build_moe_layer("switch", 6, 8, 4, num_shared_experts=3).shared_experts
    assert sum(parameter.numel() for parameter in shared.parameters()) == (6 + 1) * 3 * 8 + (3 * 8 + 1) * 6
