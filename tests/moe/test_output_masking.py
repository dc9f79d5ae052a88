"""Expert and final output masking: the formulas, drawn and at inference, for every router; and the statistics of the masks."""

import math

import pytest
import torch
from layer_by_hand import outputs_of_all

from fairseq_sparsemixer.moe.cmr import ConditionalRouting
from fairseq_sparsemixer.moe.gates import build_gate
from fairseq_sparsemixer.moe.gates.registry import GATES
from fairseq_sparsemixer.moe.layer import build_moe_layer
from fairseq_sparsemixer.moe.output_masking import mask_experts, mask_output

M, H, E, S = 6, 10, 4, 40
MASKABLE = sorted(set(GATES) - {"default_moe"})


def layer_of(router, **options):
    return build_moe_layer(router, M, H, E, **options).double()


def weights_of(routing):
    """[S, E] in float64: the combine weight of each expert, times the output scale [M] -> [S, E, M]."""
    weight = torch.zeros(len(routing.expert_index), E, dtype=torch.float64)
    weight.scatter_add_(1, routing.expert_index, routing.combine_weight.detach().double())
    scale = torch.ones(M, dtype=torch.float64) if routing.output_scale is None else routing.output_scale.detach()
    return weight.unsqueeze(-1) * scale


@pytest.mark.parametrize("router", MASKABLE)
def test_at_inference_the_experts_are_scaled_by_one_minus_p_and_so_is_the_whole_output(router):
    layer = layer_of(router, eom=0.2, fom=0.5, num_shared_experts=1).eval()
    x = torch.randn(S, M, dtype=torch.float64)
    output = layer(x)
    routed = (weights_of(layer.routing) * outputs_of_all(layer, x)).sum(1)
    shared = layer.shared_experts(x, [S])
    torch.testing.assert_close(output, 0.5 * (0.8 * routed + shared))


@pytest.mark.parametrize("router", MASKABLE)
def test_in_training_every_pair_of_a_token_and_its_expert_is_kept_or_zeroed(router):
    """The output is a sum over the routed experts with coefficients 0 or the combine weight, found by least squares."""
    plain, masked = layer_of(router), layer_of(router, eom=0.5)
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(S, M, dtype=torch.float64)
    torch.manual_seed(3)
    plain(x)
    torch.manual_seed(3)  # the gate draws first, so both route alike
    output = masked(x)
    assert torch.equal(plain.routing.expert_index, masked.routing.expert_index)
    torch.testing.assert_close(plain.routing.combine_weight, masked.routing.combine_weight)  # the gate's decision, unmasked
    weight = weights_of(masked.routing)
    contribution = weight * outputs_of_all(masked, x)  # [S, E, M]
    kept = (torch.linalg.pinv(contribution.transpose(1, 2)) @ output.unsqueeze(-1)).squeeze(-1)  # [S, E]
    ran = contribution.abs().amax(-1) > 1e-9
    coins = kept[ran]
    assert len(coins) and torch.minimum(coins.abs(), (coins - 1).abs()).max() < 1e-6
    assert 0 < coins.round().mean() < 1


def test_the_gradient_is_that_of_the_masked_sum():
    layer = layer_of("topk", top_k=2, eom=0.5)
    x = torch.randn(S, M, dtype=torch.float64)
    torch.manual_seed(3)
    output = layer(x)
    upstream = torch.randn_like(output)
    (output * upstream).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    layer.zero_grad()
    torch.manual_seed(3)  # topk draws nothing
    kept = torch.rand(S, 2) >= 0.5
    weight, index = torch.softmax(x @ layer.gate.projection.weight.t(), -1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    chosen = outputs_of_all(layer, x).gather(1, index.unsqueeze(-1).expand(-1, -1, M))
    expected = (weight * kept).unsqueeze(-1).mul(chosen).sum(1)
    torch.testing.assert_close(output, expected)
    (expected * upstream).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_final_masking_drops_the_whole_output_of_a_token_shared_networks_included():
    layer = layer_of("switch", fom=0.3, num_shared_experts=1, cmr=ConditionalRouting(M, H), jitter_eps=0.0)
    x = torch.randn(400, M, dtype=torch.float64)
    torch.manual_seed(5)
    output = layer(x)
    torch.manual_seed(5)
    kept = torch.rand(400, 1) >= 0.3
    assert torch.equal((output != 0).all(-1), kept.squeeze(-1)) and torch.equal((output == 0).all(-1), ~kept.squeeze(-1))
    layer.fom = 0.0
    torch.testing.assert_close(output, layer(x) * kept)  # what remains is not scaled up


@pytest.mark.parametrize("probability", [0.05, 0.2, 0.7])
def test_masks_have_their_probability_and_are_independent(probability):
    """Within five standard errors: of the mean, and of the share of tokens that lose both of their experts."""
    count = 40_000
    gate = build_gate("topk", M, E, top_k=2)
    routing = mask_experts(gate(torch.randn(count, M)), probability, training=True)
    lost = routing.combine_weight == 0  # [S, 2]
    for share, expected, draws in (
        (lost.float().mean(), probability, 2 * count),
        (lost.all(1).float().mean(), probability**2, count),
    ):
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / draws)
    rows = mask_output(torch.ones(count, 3), probability, training=True)
    assert set(rows.sum(1).tolist()) == {0.0, 3.0}
    assert abs((rows[:, 0] == 0).float().mean() - probability) < 5 * math.sqrt(probability * (1 - probability) / count)


def test_half_precision_masks_with_the_same_probability():
    rows = mask_output(torch.ones(100_000, 1, dtype=torch.bfloat16), 0.001, training=True)  # bfloat16 has 8 bits
    assert abs((rows == 0).float().mean() - 0.001) < 5 * math.sqrt(0.001 / 100_000)


def test_an_overflow_in_a_masked_output_vanishes():
    rows = mask_output(torch.full((64, 2), math.inf), 0.5, training=True)
    assert set(rows.flatten().tolist()) == {0.0, math.inf}


@pytest.mark.parametrize("router", ["sparsemixer", "gshard", "expert_choice", "remoe"])
def test_padding_stays_zero_and_does_not_change_the_other_tokens(router):
    layer = layer_of(router, eom=0.4, fom=0.2)
    x, padding = torch.randn(S, M, dtype=torch.float64), torch.arange(S) % 3 == 1
    other = torch.where(padding.unsqueeze(-1), torch.randn_like(x), x)
    outputs = []
    for tokens in (x, other):
        torch.manual_seed(2)
        outputs.append(layer(tokens, padding))
    assert torch.equal(*outputs) and not outputs[0][padding].any()


def test_without_masking_nothing_is_drawn():
    layer = layer_of("topk", top_k=2)
    before = torch.get_rng_state()
    layer(torch.randn(0, M, dtype=torch.float64))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("options, sentence", [
    (dict(eom=1.0), "eom=1.0 must be at least 0 and less than 1"),
    (dict(fom=-0.1), "fom=-0.1 must be at least 0 and less than 1"),
    (dict(eom=math.nan), "eom=nan must be"),
])  # fmt: skip
def test_probabilities_out_of_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_moe_layer("switch", M, H, E, **options)


def test_a_router_in_which_experts_that_do_not_run_have_an_output_refuses_expert_masking():
    with pytest.raises(ValueError, match="eom=0.1 does not work with router=default_moe"):
        build_moe_layer("default_moe", M, H, E, eom=0.1)
    layer = build_moe_layer("default_moe", M, H, E, fom=0.1).eval()
    x = torch.randn(S, M)
    masked = layer(x)
    layer.fom = 0.0
    torch.testing.assert_close(masked, 0.9 * layer(x))
