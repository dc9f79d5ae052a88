"""SparseMixer's gate, compared with float64 references written from arXiv 2310.00811 that do not call the gate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.sparsemixer import SamplingNoise, draw_sampling_noise, mask_unlikely

GAIN = {"midpoint": 2, "euler": 2, "switch": 1, "heun3": 1, "inf": 2}


def surviving(row, jitter):
    """The experts that the mask keeps, for one token's logits."""
    top = max(row)
    kept = []
    for theta in row:
        scale = max(abs(theta), top)
        kept.append(theta == top or (top - theta) / scale <= 2 * jitter if scale else True)
    return kept


def masked_softmax(row, jitter):
    kept = surviving(row, jitter)
    exponentials = [math.exp(theta - max(row)) if keep else 0.0 for theta, keep in zip(row, kept)]
    return [value / sum(exponentials) for value in exponentials]


def node(name, coin):
    """The estimator's node s for an expert that is not the arg-max."""
    if name == "midpoint":
        return 1.0 if coin >= 0.5 else 0.5
    if name == "heun3":
        return 1.0 if coin < 0.25 else 1 / 3
    if name == "inf":
        return 2 * coin if coin < 0.5 else 1.0
    return 1.0


class Reference:
    """Forward and router gradient of a batch, from logits [S, E], noise, and the upstream gradient of each weight."""

    def __init__(self, logits, gumbel, coin, upstream, jitter, name):
        self.index, self.weight, self.gradient = [], [], np.zeros_like(logits)
        for s, row in enumerate(logits.tolist()):
            pi = masked_softmax(row, jitter)
            scores = [theta + g if p > 0 else -math.inf for theta, g, p in zip(row, gumbel[s].tolist(), pi)]
            chosen = scores.index(max(scores))
            self.index.append(chosen)
            self.weight.append(pi[chosen] * (1.0 if chosen == row.index(max(row)) else node(name, coin[s].item())))
            for j in range(len(row)):  # gain * d pi_chosen / d theta_j, for any node
                self.gradient[s, j] = GAIN[name] * upstream[s].item() * pi[chosen] * ((chosen == j) - pi[j])


def gate_with_noise(logits, jitter=0.1, name="midpoint", model_dim=6):
    """(float64 gate, the noise it will use)."""
    gate = build_gate("sparsemixer", model_dim, logits.size(1), jitter_eps=jitter, gradient_estimator=name).double()
    noise = draw_sampling_noise(logits)
    gate.draw_noise = lambda logits: noise
    return gate, noise


@pytest.mark.parametrize("name", sorted(GAIN))
@pytest.mark.parametrize("jitter", [0.1, 0.6])
def test_weights_and_gradients_equal_the_papers(name, jitter):
    logits = (2 * torch.randn(200, 5, dtype=torch.float64)).requires_grad_()
    gate, noise = gate_with_noise(logits, jitter, name)
    routing = gate.route(logits)
    upstream = torch.randn(200, dtype=torch.float64)
    (routing.combine_weight.squeeze(1) * upstream).sum().backward()
    reference = Reference(logits.detach(), noise.gumbel, noise.coin, upstream, jitter, name)
    assert routing.expert_index.squeeze(1).tolist() == reference.index
    np.testing.assert_allclose(routing.combine_weight.squeeze(1).tolist(), reference.weight, rtol=1e-12)
    np.testing.assert_allclose(logits.grad.numpy(), reference.gradient, rtol=1e-9, atol=1e-12)


def test_gradients_of_tokens_and_projection_follow_by_the_chain_rule():
    tokens = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    gate, _ = gate_with_noise(torch.zeros(40, 5, dtype=torch.float64))
    weight = gate.projection.weight.detach()
    logits = tokens.detach() @ weight.t()
    noise = gate.draw_noise(logits)
    upstream = torch.randn(40, dtype=torch.float64)
    (gate(tokens).combine_weight.squeeze(1) * upstream).sum().backward()
    by_logits = torch.from_numpy(Reference(logits, noise.gumbel, noise.coin, upstream, 0.1, "midpoint").gradient)
    torch.testing.assert_close(tokens.grad, by_logits @ weight)
    torch.testing.assert_close(gate.projection.weight.grad, by_logits.t() @ tokens.detach())


def test_experts_are_drawn_with_masked_softmax_probabilities():
    rows = torch.tensor([[1.0, 0.9, 0.85, -3.0], [-1.0, -1.1, -1.15, -1.2], [0.0, 0.0, 0.0, 0.0], [2.0, 1.7, 1.65, 1.9]])
    draws = 20000
    gate = build_gate("sparsemixer", 6, 4)
    drawn = gate.route(rows.repeat_interleave(draws, 0)).expert_index.view(len(rows), draws)
    for row, chosen in zip(rows.double().tolist(), drawn):
        pi = np.array(masked_softmax(row, 0.1))
        counts = np.bincount(chosen.numpy(), minlength=4)
        assert counts[pi == 0].sum() == 0
        assert chisquare(counts[pi > 0], draws * pi[pi > 0]).pvalue > 1e-3


def test_half_of_the_draws_are_halved_except_those_of_the_argmax():
    row = torch.tensor([[1.0, 0.9, 0.95]])
    gate = build_gate("sparsemixer", 6, 3)
    routing = gate.route(row.repeat(20000, 1))
    pi = torch.tensor(masked_softmax(row[0].tolist(), 0.1))
    node = routing.combine_weight.squeeze(1) / pi[routing.expert_index.squeeze(1)]
    assert torch.allclose(node[routing.expert_index.squeeze(1) == 0], torch.ones(()))
    beside = node[routing.expert_index.squeeze(1) != 0]
    halved = torch.isclose(beside, torch.tensor(0.5))
    assert (halved | torch.isclose(beside, torch.tensor(1.0))).all()
    assert chisquare([halved.sum(), (~halved).sum()]).pvalue > 1e-3


def test_with_estimator_at_argmax_the_argmax_is_halved_as_often_as_others():
    gate = build_gate("sparsemixer", 6, 3, estimator_at_argmax=True)
    routing = gate.route(torch.tensor([[1.0, 0.9, 0.95]]).repeat(20000, 1))
    pi = torch.tensor(masked_softmax([1.0, 0.9, 0.95], 0.1))
    nodes = (routing.combine_weight / pi[routing.expert_index]).squeeze(1)
    at_argmax = nodes[routing.expert_index.squeeze(1) == 0]
    halved = torch.isclose(at_argmax, torch.tensor(0.5))
    assert chisquare([halved.sum(), (~halved).sum()]).pvalue > 1e-3
    assert gate.eval().route(torch.tensor([[1.0, 0.9, 0.95]])).combine_weight.item() == pytest.approx(pi[0].item())


@pytest.mark.parametrize("jitter, left", [(0.0, [1, 0, 0]), (float("inf"), [1, 1, 1])])
def test_zero_jitter_keeps_only_the_argmax_and_infinite_jitter_keeps_all(jitter, left):
    routing = build_gate("sparsemixer", 6, 3, jitter_eps=jitter).route(torch.tensor([[2.0, -1.0, -70.0]]))
    assert (routing.probabilities > 0).int().tolist() == [left]


logits_row = st.lists(st.floats(-50, 50, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=6)


@settings(max_examples=60)
@given(row=logits_row, jitter=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
@example(row=[-1.0, -1.1, -1.3, -5.0], jitter=0.1)
@example(row=[0.0, 0.0, 0.0], jitter=0.1)
@example(row=[0.0, -1.0], jitter=0.1)
@example(row=[3.0, 3.0, 1.0], jitter=0.0)
@example(row=[-2.0, -2.0], jitter=0.1)
def test_the_mask_equals_the_papers_for_logits_of_any_sign(row, jitter):
    masked = mask_unlikely(torch.tensor([row], dtype=torch.float64), jitter)
    assert (masked > -math.inf).tolist() == [surviving(row, jitter)]
    assert masked.max().item() == max(row)


def test_a_masked_expert_gets_no_gradient():
    logits = torch.tensor([[1.0, 0.95, -1.0]], requires_grad=True)
    build_gate("sparsemixer", 6, 3).route(logits).combine_weight.sum().backward()
    assert logits.grad[0, 2] == 0 and logits.grad[0, :2].abs().sum() > 0


def test_inference_uses_the_argmax_with_its_masked_probability_times_omega():
    logits = torch.randn(30, 5, dtype=torch.float64)
    gate = build_gate("sparsemixer", 6, 5).double().eval()
    routing = gate.route(logits)
    for s, row in enumerate(logits.tolist()):
        assert routing.expert_index[s].item() == row.index(max(row))
        assert routing.combine_weight[s].item() == pytest.approx(max(masked_softmax(row, 0.1)))
    assert routing.output_scale is gate.omega and torch.equal(gate.omega, torch.ones_like(gate.omega))


def test_routing_in_training_does_not_change_the_logits():
    logits = torch.randn(10, 4)
    before = logits.clone()
    build_gate("sparsemixer", 6, 4).route(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_routed_in_float32(dtype):
    gate, tokens = build_gate("sparsemixer", 16, 4).to(dtype), torch.randn(20, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(tokens)
    assert routing.combine_weight.dtype == routing.probabilities.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in routing.aux_losses.values())
    logits = tokens.double() @ gate.projection.weight.double().t()
    expected = torch.tensor([masked_softmax(row, 0.1) for row in logits.tolist()])
    torch.testing.assert_close(routing.probabilities, expected, rtol=1e-4, atol=1e-5)


def test_the_balance_loss_uses_the_draws_and_the_masked_softmax():
    logits = torch.randn(30, 4, dtype=torch.float64)
    padding = torch.arange(30) % 5 == 0
    gate, noise = gate_with_noise(logits)
    routing = gate.route(logits, padding)
    reference = Reference(logits, noise.gumbel, noise.coin, torch.zeros(30), 0.1, "midpoint")
    real = [s for s in range(30) if s % 5]
    pi = [masked_softmax(logits[s].tolist(), 0.1) for s in real]
    shares = [sum(reference.index[s] == e for s in real) / len(real) for e in range(4)]
    means = [sum(row[e] for row in pi) / len(real) for e in range(4)]
    assert routing.aux_losses["balance"].item() == pytest.approx(4 * sum(f * p for f, p in zip(shares, means)))


def test_noise_is_finite_and_the_coin_is_below_one():
    noise = draw_sampling_noise(torch.zeros(2000, 50))
    assert isinstance(noise, SamplingNoise)
    assert noise.gumbel.isfinite().all() and (noise.coin >= 0).all() and (noise.coin < 1).all()


def test_without_sampling_the_masked_arg_max_learns_with_twice_the_gradient_of_its_masked_probability():
    gate = build_gate("sparsemixer", 6, 5, sampled=False, scaled=False).double().train()
    tokens = torch.randn(40, 6, dtype=torch.float64)
    routing = gate(tokens)
    upstream = torch.randn(40, 1, dtype=torch.float64)
    (found,) = torch.autograd.grad((routing.combine_weight * upstream).sum(), gate.projection.weight)
    expected = torch.zeros_like(found)
    rows = gate.projection.weight.tolist()
    for token, x in enumerate(tokens.tolist()):
        theta = [sum(w * v for w, v in zip(row, x)) for row in rows]
        top = max(theta)
        kept = [e for e in range(5) if (top - theta[e]) / max(abs(theta[e]), top) <= 0.2]
        total = sum(math.exp(theta[e]) for e in kept)
        p = {e: math.exp(theta[e]) / total for e in kept}
        best = theta.index(top)
        assert routing.expert_index[token].item() == best
        assert math.isclose(routing.combine_weight[token].item(), p[best], rel_tol=1e-12)
        for e in kept:  # dp_best / dtheta_e = p_best (1[e = best] - p_e), and the gain is 2
            slope = 2 * upstream[token].item() * p[best] * ((e == best) - p[e])
            expected[e] += slope * tokens[token]
    torch.testing.assert_close(found, expected)
    assert routing.output_scale is None


def test_without_sampling_training_and_inference_give_the_same_output():
    gate = build_gate("sparsemixer", 6, 5, sampled=False)
    tokens = torch.randn(30, 6)
    trained, inferred = gate.train()(tokens), gate.eval()(tokens)
    assert torch.equal(trained.expert_index, inferred.expert_index)
    torch.testing.assert_close(trained.combine_weight, inferred.combine_weight)
