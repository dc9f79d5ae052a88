"""ReMoE, compared with its formulas token by token in float64: output, gradient, L1 loss, and the updates of lambda."""

import math

import pytest
import torch
from layer_by_hand import assert_computes, outputs_of_all
from torch import nn

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates import reset_step_states, update_step_states

E = 4


def test_output_and_gradients_equal_those_of_relu_weights():
    layer = build_moe_layer("remoe", 5, 7, E, top_k=2).double()

    def by_hand(token):
        f = outputs_of_all(layer, token)
        weights = [torch.relu(row @ token) for row in layer.gate.projection.weight]
        return sum(weight * f[e] for e, weight in enumerate(weights))

    assert_computes(layer, torch.randn(30, 5, dtype=torch.float64), by_hand)


def test_a_token_without_positive_logits_gets_no_expert_and_zero_output():
    layer = build_moe_layer("remoe", 5, 7, E)
    nn.init.constant_(layer.gate.projection.weight, -1.0)
    x = torch.cat([torch.ones(1, 5), -torch.ones(1, 5)])
    output = layer(x)
    assert (output[0] == 0).all() and (output[1] != 0).any()
    sums = layer.routing.statistics()
    assert sums["load"].tolist() == [[1.0] * E] and sums["dropped"].tolist() == [1.0]


@pytest.mark.parametrize("k", [1, 3])
def test_the_l1_loss_weights_an_expert_by_its_share_of_tokens(k):
    gate = build_gate("remoe", 5, E, top_k=k, l1_coefficient=0.25).double()
    logits = torch.randn(20, E, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(20) >= 17
    loss = gate.route(logits, padding).aux_losses["l1"]
    rows = logits.detach().tolist()[:17]
    shares = [sum(row[e] > 0 for row in rows) / 17 for e in range(E)]
    expected = 0.25 * sum(E / k * shares[e] * max(row[e], 0) for row in rows for e in range(E)) / 17
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.backward()
    slopes = [[0.25 * E / k * shares[e] / 17 * (row[e] > 0) for e in range(E)] for row in rows] + [[0.0] * E] * 3
    torch.testing.assert_close(logits.grad, torch.tensor(slopes, dtype=torch.float64))


def lambdas(model):
    return [gate.l1.value.item() for gate in model]


def test_lambda_follows_the_sparsity_of_all_layers_and_micro_batches():
    model = nn.ModuleList([build_gate("remoe", 5, E, top_k=2) for _ in range(2)])
    expected = 1e-8
    torch.manual_seed(1)
    for update in range(30):
        active = pairs = 0
        for _ in range(2):  # micro-batches
            for layer, gate in enumerate(model):
                logits = torch.randn(7 + layer, E) + 0.3 * math.sin(update) + layer - 0.5
                gate.route(logits.requires_grad_()).combine_weight.sum().backward()
                active += sum(value > 0 for row in logits.tolist() for value in row)
                pairs += len(logits) * E
        update_step_states(model)
        sparsity, target = 1 - active / pairs, 1 - 2 / E
        expected *= 1.2 ** ((target > sparsity) - (target < sparsity))
        assert lambdas(model) == pytest.approx([expected] * 2, rel=1e-5)
    assert model[0].l1.value.dtype == torch.float32 and torch.equal(model[0].l1.value, model[1].l1.value)


def test_lambda_is_unchanged_on_target_without_tokens_in_validation_and_after_a_failed_step():
    model = nn.ModuleList([build_gate("remoe", 5, E, top_k=2)])
    on_target = torch.tensor([[1.0, 1, -1, -1]], requires_grad=True)
    too_many = torch.ones(3, E, requires_grad=True)
    model[0].route(on_target).combine_weight.sum().backward()
    update_step_states(model)
    model[0].route(too_many[:0]).combine_weight.sum().backward()
    update_step_states(model)
    model[0].route(too_many, torch.ones(3, dtype=torch.bool)).combine_weight.sum().backward()
    update_step_states(model)
    model.eval()[0].route(too_many).combine_weight.sum().backward()
    update_step_states(model)
    model.train()[0].route(too_many).combine_weight.sum().backward()
    reset_step_states(model)
    update_step_states(model)
    assert lambdas(model) == pytest.approx([1e-8])


def test_lambda_recovers_from_long_sparsity():
    """As float32 it would reach zero, or numbers that a factor of 1.2 does not change."""
    gate = build_gate("remoe", 5, E, top_k=3)
    one, all_of_them = torch.tensor([[1.0, -1, -1, -1]], requires_grad=True), torch.ones(1, E, requires_grad=True)
    for logits, updates in ((one, 700), (all_of_them, 10)):
        for _ in range(updates):
            gate.route(logits).combine_weight.sum().backward()
            update_step_states(gate)
    assert gate.l1.value.item() == pytest.approx(1e-30 * 1.2**10, rel=1e-4)
    assert build_gate("remoe", 5, E, l1_coefficient=1e-50).l1.value > 0


def test_a_layer_without_active_experts_counts_as_sparse():
    """One layer runs all experts and one none: half are active, as many as wanted."""
    layers = nn.ModuleList([build_moe_layer("remoe", 5, 7, E, top_k=2) for _ in range(2)])
    nn.init.constant_(layers[0].gate.projection.weight, 1.0)
    nn.init.constant_(layers[1].gate.projection.weight, -1.0)
    x = torch.ones(6, 5)
    for wanted, factor in ((2, 1.0), (1, 1.2), (3, 1 / 1.2)):
        for layer in layers:
            layer.gate.l1.value.fill_(0.5)
            layer.gate.l1.top_k = wanted
            layer(x).sum().backward()
        update_step_states(layers)
        assert [layer.gate.l1.value.item() for layer in layers] == pytest.approx([0.5 * factor] * 2)


def train(updates, **options):
    """The layer, and the mean number of experts per token after each update; the inputs are symmetric around zero."""
    torch.manual_seed(0)
    layer = build_moe_layer("remoe", 6, 8, E, top_k=1, **options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    x, y = torch.randn(2, 200, 6)
    counts = []
    for _ in range(updates):
        optimizer.zero_grad()
        ((layer(x) - y).square().mean() + layer.routing.aux_losses["l1"]).backward()
        optimizer.step()
        update_step_states(layer)
        counts.append(layer.routing.statistics()["load"].sum().item() / len(x))
    return layer, counts


def test_training_reaches_the_target_number_of_experts():
    _, counts = train(400, l1_coefficient=1e-3, router_bias=True)
    assert counts[0] > 1.7 and sum(counts[-100:]) / 100 == pytest.approx(1, abs=0.1)


def test_lambda_stays_finite_if_a_router_without_bias_cannot_reach_the_target():
    layer, counts = train(20, l1_coefficient=900.0)
    assert counts[-1] > 1.5 and layer.gate.l1.value.item() == 1000


def test_lambda_is_kept_in_half_precision_and_in_checkpoints():
    layer = build_moe_layer("remoe", 4, 8, E)
    layer.gate.l1.value.fill_(3e-9)  # zero in float16
    restored = build_moe_layer("remoe", 4, 8, E).half()
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.gate.l1.value, layer.gate.l1.value)


@pytest.mark.parametrize("options, message", [
    (dict(l1_coefficient=0.0), r"l1_coefficient=0.0 must lie in \(0, 1000\]"),
    (dict(l1_multiplier=0.9), "l1_multiplier=0.9 must be at least 1 and finite"),
    (dict(top_k=5), "top_k=5 must lie between 1 and num_experts=4"),
])  # fmt: skip
def test_out_of_range_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_gate("remoe", 4, E, **options)
