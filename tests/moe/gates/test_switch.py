"""Switch's gate, compared with the formulas of arXiv 2101.03961 in float64, without calling the gate."""

import math

import pytest
import torch
from scipy.stats import kstest

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.switch import switch_routing


def softmax(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("with_jitter", [False, True])
def test_weight_and_gradient_equal_those_of_the_argmax_probability(with_jitter):
    logits = torch.randn(60, 5, dtype=torch.float64, requires_grad=True)
    jitter = torch.rand(60, 5, dtype=torch.float64) * 0.2 + 0.9 if with_jitter else None
    routing = switch_routing(logits, jitter=jitter)
    upstream = torch.randn(60, dtype=torch.float64)
    (routing.combine_weight.squeeze(1) * upstream).sum().backward()
    for s in range(60):
        noise = jitter[s].tolist() if with_jitter else [1.0] * 5
        row = [theta * factor for theta, factor in zip(logits[s].tolist(), noise)]
        pi, chosen = softmax(row), row.index(max(row))
        assert routing.expert_index[s].item() == chosen
        assert routing.combine_weight[s].item() == pytest.approx(pi[chosen], rel=1e-12)
        expected = [upstream[s].item() * pi[chosen] * ((chosen == j) - pi[j]) * noise[j] for j in range(5)]
        assert logits.grad[s].tolist() == pytest.approx(expected, rel=1e-9)


def test_jitter_multiplies_logits_by_uniform_noise_in_training_only():
    gate = build_gate("switch", 6, 4, jitter_eps=0.3)
    noise = gate.draw_noise(torch.zeros(5000, 4)).flatten()
    assert kstest(noise.tolist(), "uniform", args=(0.7, 0.6)).pvalue > 1e-3
    assert gate.eval().draw_noise(torch.zeros(2, 4)) is None
    assert build_gate("switch", 6, 4, jitter_eps=0).draw_noise(torch.zeros(2, 4)) is None


def test_inference_uses_the_argmax_with_its_full_softmax_probability():
    logits = torch.randn(20, 5, dtype=torch.float64)
    routing = build_gate("switch", 6, 5).eval().route(logits)
    for s, row in enumerate(logits.tolist()):
        assert routing.expert_index[s].item() == row.index(max(row))
        assert routing.combine_weight[s].item() == pytest.approx(max(softmax(row)))
    assert routing.output_scale is None


def test_auxiliary_losses_use_only_non_padding_tokens():
    logits = torch.randn(12, 3, dtype=torch.float64)
    padding = torch.arange(12) % 4 == 1
    losses = switch_routing(logits, padding).aux_losses
    rows = logits[~padding].tolist()
    pi = [softmax(row) for row in rows]
    shares = [sum(row.index(max(row)) == e for row in rows) / len(rows) for e in range(3)]
    means = [sum(row[e] for row in pi) / len(rows) for e in range(3)]
    assert losses["balance"].item() == pytest.approx(3 * sum(f * p for f, p in zip(shares, means)))
    squares = [math.log(sum(map(math.exp, row))) ** 2 for row in rows]
    assert losses["router_z"].item() == pytest.approx(sum(squares) / len(squares))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_are_routed_in_float32(dtype):
    gate, tokens = build_gate("switch", 16, 4).to(dtype).eval(), torch.randn(20, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        routing = gate(tokens)
    logits = tokens.double() @ gate.projection.weight.double().t()
    expected = torch.tensor([softmax(row) for row in logits.tolist()])
    assert routing.combine_weight.dtype == torch.float32
    torch.testing.assert_close(routing.probabilities, expected, rtol=1e-4, atol=1e-5)
