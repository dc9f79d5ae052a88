"""Noisy top-k gating, compared with the equations of arXiv 1701.06538 in float64, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.noisy_topk import GaussianNoise, noisy_topk_routing


def phi(z):
    return (1 + math.erf(z / math.sqrt(2))) / 2


def cv2(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def reference(logits, normal, std, k):
    """Eqs. 3 to 11: (chosen experts, weights, importance loss, load loss)."""
    num_experts = len(logits[0])
    chosen, weights, importance, load = [], [], [0.0] * num_experts, [0.0] * num_experts
    for clean, z, sigma in zip(logits, normal, std):
        noisy = [c + n * s for c, n, s in zip(clean, z, sigma)]
        best = sorted(range(num_experts), key=lambda e: -noisy[e])[:k]
        exponentials = [math.exp(noisy[e]) for e in best]
        chosen.append(best)
        weights.append([value / sum(exponentials) for value in exponentials])
        for e, weight in zip(best, weights[-1]):
            importance[e] += weight
        for e in range(num_experts):
            kth_excluding = sorted((noisy[j] for j in range(num_experts) if j != e), reverse=True)[k - 1]
            load[e] += phi((clean[e] - kth_excluding) / sigma[e])
    return chosen, weights, cv2(importance), cv2(load)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_routing_and_losses_equal_the_papers(k):
    logits, normal = torch.randn(2, 15, 5, dtype=torch.float64)
    std = torch.rand(15, 5, dtype=torch.float64) + 0.3
    padding = torch.arange(15) % 5 == 2
    routing = noisy_topk_routing(logits, padding, k, GaussianNoise(normal, std))
    real = ~padding
    chosen, weights, importance, load = reference(logits[real].tolist(), normal[real].tolist(), std[real].tolist(), k)
    assert routing.expert_index[real].tolist() == chosen
    torch.testing.assert_close(routing.combine_weight[real], torch.tensor(weights, dtype=torch.float64))
    assert routing.aux_losses["importance"].item() == pytest.approx(importance)
    assert routing.aux_losses["load"].item() == pytest.approx(load)


def test_gradients_of_both_projections_are_exact():
    logits, normal = torch.randn(2, 6, 4, dtype=torch.float64)
    raw = torch.randn(6, 4, dtype=torch.float64)

    def outputs(logits, raw):
        routing = noisy_topk_routing(logits, None, 2, GaussianNoise(normal, F.softplus(raw)))
        return routing.combine_weight, routing.aux_losses["importance"], routing.aux_losses["load"]

    assert torch.autograd.gradcheck(outputs, (logits.requires_grad_(), raw.requires_grad_()))


def test_with_all_experts_chosen_the_load_is_even_and_weights_are_the_full_softmax():
    logits = torch.randn(6, 3, dtype=torch.float64)
    routing = noisy_topk_routing(logits, None, 3)
    assert routing.aux_losses["load"].item() == 0
    weights = torch.zeros(6, 3, dtype=torch.float64).scatter(1, routing.expert_index, routing.combine_weight)
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_noise_is_normal_learned_and_absent_at_inference():
    gate = build_gate("noisy_topk", 6, 4, top_k=2)
    std = torch.ones(4000, 4)
    assert kstest(gate.draw_noise(std).normal.flatten().tolist(), "norm").pvalue > 1e-3
    tokens = torch.randn(50, 6)
    routing = gate(tokens)
    assert len(routing.expert_index.unique()) == 4  # both projections start at zero, so only noise decides
    (routing.combine_weight * torch.randn(50, 2)).sum().backward()
    assert gate.noise_projection.weight.grad.abs().sum() > 0 and gate.projection.weight.grad.abs().sum() > 0
    torch.nn.init.normal_(gate.projection.weight)
    gate.eval()
    routing = gate(tokens)
    assert torch.equal(routing.expert_index, gate.logits(tokens).topk(2, -1).indices)
    assert torch.equal(routing.combine_weight, gate.route(gate.logits(tokens)).combine_weight)


def test_the_load_without_noise_is_the_token_count():
    logits = torch.randn(40, 4, dtype=torch.float64)
    routing = noisy_topk_routing(logits, None, 2)
    counts = torch.bincount(routing.expert_index.flatten(), minlength=4).tolist()
    assert routing.aux_losses["load"].item() == pytest.approx(cv2(counts))


def test_both_projections_start_at_zero():
    gate = build_gate("noisy_topk", 16, 4)
    assert not gate.projection.weight.any() and not gate.noise_projection.weight.any()
