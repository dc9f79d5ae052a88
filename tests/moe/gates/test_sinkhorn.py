"""Sinkhorn routing, compared with its fixed point in float64."""

import math

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.sinkhorn import sinkhorn, sinkhorn_routing


def scaled_by_hand(logits, rounds):
    """exp(logits) with rows scaled to sum 1 / S, then columns to 1 / E, repeated."""
    matrix = [[math.exp(value) for value in row] for row in logits]
    size, width = len(matrix), len(matrix[0])
    for _ in range(rounds):
        matrix = [[v / sum(row) / size for v in row] for row in matrix]
        totals = [sum(row[e] for row in matrix) for e in range(width)]
        matrix = [[v / totals[e] / width for e, v in enumerate(row)] for row in matrix]
    return matrix


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_scaling_gives_the_doubly_normalised_matrix(scale):
    logits = scale * torch.randn(16, 4, dtype=torch.float64)
    expected = torch.tensor(scaled_by_hand(logits.tolist(), 2000), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits), expected, atol=2e-4, rtol=2e-2)


@pytest.mark.parametrize("every", [3, 10])
def test_looking_less_often_changes_nothing(every, monkeypatch):
    """As on a GPU, where each look makes the host wait."""
    logits = torch.randn(16, 4, dtype=torch.float64)
    expected = sinkhorn(logits)
    monkeypatch.setattr("fairseq_sparsemixer.moe.gates.sinkhorn.LOOK_EVERY", every)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert torch.equal(sinkhorn(logits), expected)


def test_training_selects_by_the_scaled_matrix_and_inference_by_logits():
    logits = torch.randn(40, 4, dtype=torch.float64)
    logits[:, 0] += 2
    scaled = torch.tensor(scaled_by_hand(logits.tolist(), 500))
    gate = build_gate("sinkhorn", 6, 4)
    trained = gate.route(logits).expert_index
    assert torch.equal(trained.squeeze(1), scaled.argmax(-1))
    assert torch.equal(gate.eval().route(logits).expert_index.squeeze(1), logits.argmax(-1))
    counts = [torch.bincount(index.flatten(), minlength=4).max().item() for index in (trained, logits.argmax(-1))]
    assert counts[0] < counts[1] / 2


@pytest.mark.parametrize("k", [1, 3])
def test_the_weight_is_the_sigmoid_for_one_expert_and_the_softmax_for_more(k):
    logits = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    routing = sinkhorn_routing(logits, None, k, balanced=True)
    for row, experts, weights in zip(logits.tolist(), routing.expert_index.tolist(), routing.combine_weight.tolist()):
        total = sum(map(math.exp, row))
        expected = [1 / (1 + math.exp(-row[e])) if k == 1 else math.exp(row[e]) / total for e in experts]
        assert weights == pytest.approx(expected)
    assert "balance" not in routing.aux_losses
    assert torch.autograd.gradcheck(lambda x: sinkhorn_routing(x, None, k, True).combine_weight, logits)


def test_padding_does_not_affect_other_tokens_and_large_logits_stay_finite():
    logits = torch.randn(12, 4, dtype=torch.float64)
    padding = torch.arange(12) % 3 == 0
    alone = sinkhorn(logits[~padding])
    torch.testing.assert_close(sinkhorn(logits, padding)[~padding], alone)
    assert sinkhorn(logits, padding)[padding].abs().sum() == 0
    assert sinkhorn(200 * torch.randn(12, 4)).isfinite().all()
    assert sinkhorn(logits, torch.ones(12, dtype=torch.bool)).abs().sum() == 0


def settled_by_hand(logits):
    """Megatron-Core's loop: row factors, then column factors, until these change by at most 1e-4 on average."""
    kernel = [[math.exp(value) for value in row] for row in logits]
    size, width = len(kernel), len(kernel[0])
    column, change = [1.0] * width, math.inf
    while change > 1e-4:
        before = column
        row = [1 / size / sum(v * c for v, c in zip(values, column)) for values in kernel]
        column = [1 / width / sum(values[e] * r for values, r in zip(kernel, row)) for e in range(width)]
        change = sum(abs(new - old) for new, old in zip(column, before)) / width
    return [[v * c * r for v, c in zip(values, column)] for values, r in zip(kernel, row)]


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_scaling_stops_where_megatron_core_stops(scale):
    logits = scale * torch.randn(16, 4, dtype=torch.float64)
    expected = torch.tensor(settled_by_hand(logits.tolist()), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits), expected, rtol=1e-6, atol=0)
