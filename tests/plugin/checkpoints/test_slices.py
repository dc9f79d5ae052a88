"""Slices of a dense layer as experts, against the dense layer in float64, and hidden units that are drawn anew."""

import pytest
import torch

from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.slices import Change, make_experts
from fairseq_sparsemixer.plugin.checkpoints.starting_gates import group_gate

M, H, N = 5, 12, 8


def dense_layer():
    shapes = {"fc1.weight": (H, M), "fc1.bias": (H,), "fc2.weight": (M, H), "fc2.bias": (M,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def dense_output(dense, x):
    return torch.relu(x @ dense["fc1.weight"].t() + dense["fc1.bias"]) @ dense["fc2.weight"].t() + dense["fc2.bias"]


ROUTERS = {  # G, flags, and the largest relative difference of a token's output
    "normalised": (4, dict(router="topk", moe_top_k=4), 0),
    "two groups": (2, dict(router="topk", moe_top_k=4), 0),
    "gshard": (2, dict(router="gshard"), 0),
    "raw softmax": (2, dict(router="topk", moe_top_k=2, router_weights="raw"), 0.05),
    "raw sigmoid, scaled": (
        4,
        dict(router="topk", moe_top_k=4, router_weights="raw", router_score="sigmoid", router_scale=2.5),
        0.05,
    ),
    "dense_st": (2, dict(router="dense_st", moe_top_k=2), 0.05),
}


@pytest.mark.parametrize("case", ROUTERS)
def test_the_sum_of_the_chosen_groups_is_the_dense_layer(case):
    granularity, options, spread = ROUTERS[case]
    dense, x = dense_layer(), torch.randn(40, M, dtype=torch.float64)
    found = group_gate(M, MoEOptions(num_experts=N, **options), granularity)
    assert (found.spread > 0) == (spread > 0) and found.spread <= spread
    experts = Experts(N, M, H // granularity)
    layer = MoELayer(found.gate, experts).double().eval()
    experts.load_state_dict(make_experts(dense, N, Change(granularity=granularity)))
    with torch.no_grad():
        output, expected = layer(x) / found.multiplier, dense_output(dense, x)
    torch.testing.assert_close(output, expected, rtol=spread + 1e-6, atol=1e-6)  # gates compute in float32
    assert len(layer.routing.expert_index.unique()) > granularity, "tokens spread over groups"
    unscaled = output * (expected.norm(dim=1) / output.norm(dim=1)).unsqueeze(1)
    torch.testing.assert_close(unscaled, expected, rtol=1e-6, atol=1e-6)  # up to a factor per token, it is exact


def test_slices_add_up_to_the_dense_layer_exactly():
    dense, x = dense_layer(), torch.randn(40, M, dtype=torch.float64)
    made = make_experts(dense, N, Change(granularity=4))
    hidden = torch.relu(torch.einsum("sm,emh->esh", x, made["weight_in"]) + made["bias_in"].unsqueeze(1))
    outputs = torch.einsum("esh,ehm->esm", hidden, made["weight_out"]) + made["bias_out"].unsqueeze(1)
    for group in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(outputs[group].sum(0), dense_output(dense, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("share, drawn", [(0.0, 0), (0.5, 300), (1.0, 600)])
def test_a_share_of_the_hidden_units_of_each_expert_is_drawn_anew(share, drawn):
    hidden = 600
    shapes = {"fc1.weight": (hidden, M), "fc1.bias": (hidden,), "fc2.weight": (M, hidden), "fc2.bias": (M,)}
    dense = {name: 3 + 2 * torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    torch.manual_seed(1)
    made = make_experts(dense, 2, Change(reinitialised=share))
    units = []
    for expert in range(2):
        columns = made["weight_in"][expert] != dense["fc1.weight"].t()  # [M, H]
        assert (columns.all(0) == columns.any(0)).all(), "a unit is drawn whole"
        changed = columns.all(0)
        assert int(changed.sum()) == drawn
        assert torch.equal(changed, (made["weight_out"][expert] != dense["fc2.weight"].t()).all(1))
        assert torch.equal(changed, made["bias_in"][expert] != dense["fc1.bias"])
        units.append(changed)
        if drawn:
            values = made["weight_out"][expert][changed]
            assert values.mean().item() == pytest.approx(3, abs=0.2) and values.std().item() == pytest.approx(2, abs=0.2)
    assert torch.equal(made["bias_out"], dense["fc2.bias"].expand(2, M))
    assert share in (0, 1) or not torch.equal(*units), "each expert has others"
