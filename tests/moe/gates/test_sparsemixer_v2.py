"""SparseMixer-v2, compared with GRIN's formulas (arXiv 2409.12136), token by token in float64."""

import math

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.estimators import get_estimator
from fairseq_sparsemixer.moe.gates.sparsemixer import SamplingNoise
from fairseq_sparsemixer.moe.gates.sparsemixer_v2 import sparsemixer_v2_routing


def draw_by_hand(theta, taken, eps, gumbel, coin):
    """One draw: (expert, multiplier, gradient of the multiplier by theta). Without gumbel, the arg-max."""
    left = [e for e in range(len(theta)) if e not in taken]
    top = max(theta[e] for e in left)
    within = [e for e in left if (top - theta[e]) / max(abs(theta[e]), top) <= 2 * eps]
    total = sum(math.exp(theta[e]) for e in within)
    pi = {e: math.exp(theta[e]) / total for e in within}
    chosen = max(within, key=lambda e: theta[e] + (gumbel[e] if gumbel else 0))
    node = 1.0 if not gumbel or theta[chosen] == top or coin < 0.25 else 1 / 3
    slope = [
        pi[chosen] * ((chosen == j) - pi[j]) if j in pi else 0.0 for j in range(len(theta))
    ]  # derivative of pi, not of pi * node
    return chosen, pi[chosen] * node, slope


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("sampled", [True, False])
def test_draws_multipliers_and_gradient_equal_the_papers(k, sampled):
    tokens, num_experts, eps = 40, 4, 0.3
    logits = (torch.randn(tokens, num_experts, dtype=torch.float64) + 3).requires_grad_()
    noise = [
        SamplingNoise(torch.randn(tokens, num_experts, dtype=torch.float64), torch.rand(tokens, dtype=torch.float64))
        for _ in range(k)
    ]
    routing = sparsemixer_v2_routing(logits, None, k, eps, get_estimator("heun3"), noise if sampled else None)
    upstream = torch.randn(tokens, k, dtype=torch.float64)
    (routing.combine_weight * upstream).sum().backward()
    nodes = set()
    for s, theta in enumerate(logits.tolist()):
        taken, expected = [], [0.0] * num_experts
        for rank in range(k):
            gumbel = noise[rank].gumbel[s].tolist() if sampled else None
            chosen, multiplier, slope = draw_by_hand(theta, taken, eps, gumbel, noise[rank].coin[s].item())
            assert routing.expert_index[s, rank].item() == chosen
            assert routing.combine_weight[s, rank].item() == pytest.approx(multiplier, rel=1e-12)
            expected = [total + upstream[s, rank].item() * d for total, d in zip(expected, slope)]
            taken.append(chosen)
            nodes.add(chosen == max(range(num_experts), key=theta.__getitem__))
        assert logits.grad[s].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-14)
    assert not sampled or nodes == {True, False}


def test_any_expert_can_be_drawn_and_none_twice():
    routing = build_gate("sparsemixer_v2", 6, 4, top_k=4).route(torch.randn(50, 4))
    assert (routing.expert_index.sort(1).values == torch.arange(4)).all()


def test_the_balance_loss_uses_all_draws_and_the_softmax_without_mask():
    logits = torch.tensor([[2.0, 1.0, -1.0], [0.0, -3.0, 1.0]], dtype=torch.float64)
    routing = build_gate("sparsemixer_v2", 6, 3, top_k=2).double().eval().route(logits)  # chooses 0, 1 and 2, 0
    pi = [[math.exp(theta) / sum(map(math.exp, row)) for theta in row] for row in logits.tolist()]
    means = [(pi[0][e] + pi[1][e]) / 2 for e in range(3)]
    assert routing.aux_losses["balance"].item() == pytest.approx(3 * (means[0] / 2 + means[1] / 4 + means[2] / 4))
    torch.testing.assert_close(routing.probabilities, torch.tensor(pi, dtype=torch.float64))


def test_each_draw_has_fresh_noise_and_inference_has_none():
    gate = build_gate("sparsemixer_v2", 6, 4, top_k=3)
    noise = gate.draw_noise(torch.zeros(20, 4))
    assert len(noise) == 3 and not torch.equal(noise[0].gumbel, noise[1].gumbel)
    assert gate.eval().draw_noise(torch.zeros(20, 4)) is None


def test_with_estimator_at_argmax_each_draws_argmax_also_uses_the_estimators_nodes():
    gate = build_gate("sparsemixer_v2", 6, 2, estimator_at_argmax=True)
    routing = gate.route(torch.tensor([[1.0, -9.0]]).repeat(20000, 1))  # the mask leaves one expert for each draw
    for weight in routing.combine_weight.t():  # pi is 1
        assert set(weight.tolist()) == {1.0, torch.tensor(1 / 3).item()}
        assert weight.eq(1).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_defaults_are_grins_two_experts_and_heuns_third_order_method():
    gate = build_gate("sparsemixer_v2", 6, 4)
    assert (gate.top_k, gate.estimator.name) == (2, "heun3") and not hasattr(gate, "omega")
    assert gate.estimator.first_order_argmax
