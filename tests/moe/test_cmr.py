"""Conditional MoE routing: the mixture, its gradients, gate dropout and the budget loss, by their formulas in float64."""

import pytest
import torch
from layer_by_hand import assert_computes, outputs_of_all
from ranks import run_ranks
from torch import distributed as dist

from fairseq_sparsemixer.moe.cmr import ConditionalRouting, budget_loss
from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope
from fairseq_sparsemixer.moe.gates.registry import GATES
from fairseq_sparsemixer.moe.layer import build_moe_layer

M, H, E, S = 6, 10, 4, 30


def layer_of(router="switch", gate_dropout=0.0, **options):
    cmr = ConditionalRouting(M, H + 2, gate_dropout=gate_dropout)
    return build_moe_layer(router, M, H, E, cmr=cmr, **options).double()


def shared_output(layer, x):
    """The shared network for x [..., M]."""
    shared = layer.cmr.shared
    return torch.relu(x @ shared.weight_in[0] + shared.bias_in[0]) @ shared.weight_out[0] + shared.bias_out[0]


def gate_value(layer, x):
    return torch.sigmoid(x @ layer.cmr.gate.weight[0] + layer.cmr.gate.bias[0])


def test_the_output_and_every_gradient_are_those_of_the_mixture():
    layer = layer_of(jitter_eps=0.0)
    padding = torch.arange(S) % 4 == 3

    def by_hand(token):
        probability = torch.softmax(token @ layer.gate.projection.weight.t(), -1)
        routed = probability.max() * outputs_of_all(layer, token)[probability.argmax()]
        g = gate_value(layer, token)
        return (1 - g) * shared_output(layer, token) + g * routed

    assert_computes(layer, torch.randn(S, M, dtype=torch.float64), by_hand, padding)


@pytest.mark.parametrize("router", sorted(GATES))
def test_every_router_mixes_with_the_shared_network(router):
    layer = layer_of(router).eval()
    x = torch.randn(S, M, dtype=torch.float64)
    output, cmr = layer(x), layer.cmr
    layer.cmr = None
    routed = layer(x)
    layer.cmr = cmr
    g = gate_value(layer, x).unsqueeze(-1)
    torch.testing.assert_close(output, (1 - g) * shared_output(layer, x) + g * routed)


def test_gate_dropout_zeroes_or_scales_the_gate_in_training_only():
    layer = layer_of(gate_dropout=0.25, jitter_eps=0.0)
    x = torch.randn(4000, M, dtype=torch.float64)
    layer(x)
    found, g = layer.routing.cmr_gate, gate_value(layer, x)
    dropped = found == 0
    torch.testing.assert_close(found[~dropped], g[~dropped] / 0.75)
    assert abs(dropped.double().mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    layer.eval()(x)
    torch.testing.assert_close(layer.routing.cmr_gate, g)


def test_dropped_tokens_get_the_shared_network_alone():
    layer = layer_of(gate_dropout=0.5)
    x = torch.randn(S, M, dtype=torch.float64)
    output = layer(x)
    alone = layer.routing.cmr_gate == 0
    assert 0 < alone.sum() < S
    torch.testing.assert_close(output[alone], shared_output(layer, x)[alone])


def test_the_budget_loss_is_over_the_real_tokens_of_all_layers_together():
    layers, gates = [layer_of(), layer_of()], []
    for layer, count in zip(layers, (10, 30)):
        x, padding = torch.randn(count, M, dtype=torch.float64), torch.arange(count) % 5 == 0
        layer(x, padding)
        gates.append(gate_value(layer, x)[~padding])
    loss = budget_loss([layer.routing for layer in layers], 0.8)
    expected = (torch.cat(gates).mean() - 0.8).abs()
    torch.testing.assert_close(loss, expected)
    weights = [layer.cmr.gate.weight for layer in layers]
    for found, wanted in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(expected, weights)):
        torch.testing.assert_close(found, wanted)


def test_without_tokens_the_budget_loss_is_zero():
    layer = layer_of()
    layer(torch.randn(3, M, dtype=torch.float64), torch.ones(3, dtype=torch.bool))
    loss = budget_loss([layer.routing], 0.8)
    loss.backward()
    assert loss == 0 and not layer.cmr.gate.weight.grad.any()


def test_an_idle_rank_adds_nothing_and_has_all_gradients():
    layer = layer_of()
    layer.idle = True
    layer(torch.randn(S, M, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.cmr.parameters())


def test_the_gates_gradient_is_summed_in_float32_in_half_precision():
    """A sum of M products of 300 * 300 overflows float16."""
    cmr = ConditionalRouting(M, H).half()
    torch.nn.init.zeros_(cmr.shared.bias_out), torch.nn.init.zeros_(cmr.shared.weight_out)
    tokens, routed = torch.zeros(2, M, dtype=torch.float16), torch.full((2, M), 300.0, dtype=torch.float16)
    output, gate = cmr(tokens, routed, None)
    (grad,) = torch.autograd.grad(output, gate, torch.full_like(output, 300.0))
    assert gate.dtype == torch.float32 and grad.tolist() == [300.0 * 300 * M] * 2


def test_under_autocast_the_output_has_its_precision_and_the_gate_is_float32():
    layer = build_moe_layer("switch", M, H, E, jitter_eps=0.0, cmr=ConditionalRouting(M, H), eom=0.1, fom=0.1).eval()
    x = torch.randn(S, M)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16 and layer.routing.cmr_gate.dtype == torch.float32
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)
    output.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.cmr.parameters())


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_gate_dropout_out_of_range_is_refused(value):
    with pytest.raises(ValueError, match=f"gate_dropout={value} must be at least 0 and less than 1"):
        ConditionalRouting(M, H, gate_dropout=value)


def budget_on_rank():
    """The global budget loss and this rank's gradient of its sum over ranks, for one of two unequal parts of a batch."""
    torch.manual_seed(4)
    layer = layer_of()
    x = torch.randn(S, M, dtype=torch.float64)
    start, stop = ((0, 8), (8, S))[dist.get_rank()]
    layer(x[start:stop])
    loss = budget_loss([layer.routing], 0.9, RanksScope(dist.group.WORLD))
    (loss * (stop - start)).backward()  # as a criterion does: times the sample size
    return loss.item(), layer.cmr.gate.weight.grad


@pytest.mark.distributed
def test_over_all_ranks_the_budget_loss_is_that_of_one_process():
    torch.manual_seed(4)
    layer = layer_of()
    x = torch.randn(S, M, dtype=torch.float64)
    expected = (gate_value(layer, x).mean() - 0.9).abs()
    (expected * S).backward()
    results = run_ranks(2, budget_on_rank)
    assert [loss for loss, _ in results] == pytest.approx([expected.item()] * 2)
    torch.testing.assert_close(sum(grad for _, grad in results), layer.cmr.gate.weight.grad)
