"""DenseMixer: top-k forward and full router gradient, compared with an explicit layer in float64."""

import math

import pytest
import torch
from layer_by_hand import outputs_of_all

from fairseq_sparsemixer import build_moe_layer


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_forward_is_top_k_and_the_router_gradient_uses_every_expert(k):
    layer = build_moe_layer("dense_st", 5, 7, 4, top_k=k).double()
    x = torch.randn(30, 5, dtype=torch.float64)
    upstream = torch.randn(30, 5, dtype=torch.float64)
    output = layer(x)
    (output * upstream).sum().backward()

    weight = layer.gate.projection.weight.detach().clone().requires_grad_()
    pi = (x @ weight.t()).softmax(-1)
    kept = torch.zeros_like(pi)
    for s in range(30):
        kept[s, sorted(range(4), key=lambda e: -pi[s, e].item())[:k]] = 1
    f = outputs_of_all(layer, x)
    torch.testing.assert_close(output, torch.einsum("se,sem->sm", pi.detach() * kept, f))
    (torch.einsum("se,sem->sm", pi, f.detach()) * upstream).sum().backward()  # as if every expert had been chosen
    torch.testing.assert_close(layer.gate.projection.weight.grad, weight.grad)
    grad_out = torch.einsum("se,sem,sm->em", pi.detach() * kept, torch.ones_like(f), upstream)
    torch.testing.assert_close(layer.experts.bias_out.grad, grad_out)  # experts learn from the tokens that chose them


@pytest.mark.parametrize("k", [1, 2, 4])
def test_renormalised_weights_sum_to_one_and_other_experts_use_the_same_divisor(k):
    layer = build_moe_layer("dense_st", 5, 7, 4, top_k=k, renormalise=True).double()
    x = torch.randn(20, 5, dtype=torch.float64)
    upstream = torch.randn(20, 5, dtype=torch.float64)
    output = layer(x)
    (output * upstream).sum().backward()
    torch.testing.assert_close(layer.routing.combine_weight.sum(1), torch.ones(20, dtype=torch.float64))

    weight = layer.gate.projection.weight.detach().clone().requires_grad_()
    f = outputs_of_all(layer, x).detach()
    surrogate = 0.0
    for s in range(20):  # one token at a time
        pi = (weight @ x[s]).softmax(0)
        best = sorted(range(4), key=lambda e: -pi[e].item())
        total = sum(pi[e] for e in best[:k])
        expected = sum(pi[e] / total * f[s, e] for e in best[:k])
        torch.testing.assert_close(output[s], expected)
        straight_through = sum((pi[e] / total.detach() * f[s, e] for e in best[k:]), torch.zeros(5, dtype=torch.float64))
        surrogate = surrogate + ((expected + straight_through) * upstream[s]).sum()
    surrogate.backward()
    torch.testing.assert_close(layer.gate.projection.weight.grad, weight.grad)
    torch.testing.assert_close(layer.eval()(x), output)


def test_the_balance_loss_counts_only_chosen_experts():
    logits = torch.tensor([[2.0, 1.0, -1.0], [3.0, 0.0, 1.0]], dtype=torch.float64)  # both choose expert 0
    gate = build_moe_layer("dense_st", 5, 7, 3, top_k=1).gate
    mean = sum(math.exp(row[0]) / sum(map(math.exp, row)) for row in logits.tolist()) / 2
    assert gate.route(logits).aux_losses["balance"].item() == pytest.approx(3 * mean)


def test_inference_runs_k_experts_and_gives_the_same_output():
    layer = build_moe_layer("dense_st", 5, 7, 4, top_k=2)
    x = torch.randn(20, 5)
    trained = layer(x)
    assert layer.routing.expert_index.shape == (20, 4) and layer.routing.statistics()["load"].sum() == 40
    torch.testing.assert_close(layer.eval()(x), trained)
    assert layer.routing.expert_index.shape == (20, 2)


def test_experts_of_zero_probability_chosen_by_a_bias_get_no_weight():
    gate = build_moe_layer("dense_st", 5, 7, 3, top_k=1, bias_update_rate=0.001, renormalise=True).gate
    gate.balancer.bias.copy_(torch.tensor([0.0, 300.0, 0.0]))
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)  # exp(-200) is 0 in float32
    for training in (True, False):
        routing = gate.train(training).route(logits)
        assert routing.expert_index[0, 0] == 1 and routing.combine_weight[0, 0] == 0
        assert gate.weigh(logits, routing.expert_index[:, :1]).item() == 0
