"""Expert threshold routing, compared with its formulas token by token in float64, and the updates of its thresholds."""

import math

import pytest
import torch
from layer_by_hand import assert_computes, outputs_of_all
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates import reset_step_states, update_step_states

E = 4


def logits_of(layer, token):
    return [row @ token for row in layer.gate.projection.weight]


@pytest.mark.parametrize("training", [True, False])
def test_an_expert_takes_the_tokens_with_logits_above_its_threshold(training):
    layer = build_moe_layer("expert_threshold", 5, 7, E, warmup_updates=0).double().train(training)
    layer.gate.threshold.value.copy_(torch.tensor([-0.4, 0.0, 0.1, 0.3]))
    thresholds = layer.gate.threshold.value.tolist()

    def by_hand(token):
        f, logits = outputs_of_all(layer, token), logits_of(layer, token)
        weights = [logit.sigmoid() * (logit.item() > c) for logit, c in zip(logits, thresholds)]
        return sum(weight * f[e] for e, weight in enumerate(weights))

    assert_computes(layer, torch.randn(30, 5, dtype=torch.float64), by_hand)
    counts = layer.routing.chosen_count()
    assert counts.shape == (1, E) and 0 < counts.sum() < 30 * E


def test_at_inference_a_token_does_not_depend_on_others_and_thresholds_stay():
    layer = build_moe_layer("expert_threshold", 5, 7, E, top_k=2).eval()
    layer.gate.threshold.value.normal_()
    before = layer.gate.threshold.value.clone()
    x = torch.randn(20, 5)
    together = layer(x)
    alone = torch.cat([layer(token.unsqueeze(0)) for token in x])
    torch.testing.assert_close(together, alone)
    update_step_states(layer)
    assert torch.equal(layer.gate.threshold.value, before)


@pytest.mark.parametrize("k", [1, 3])
def test_during_warm_up_every_expert_takes_its_best_tokens_of_the_batch(k):
    gate = build_gate("expert_threshold", 5, E, top_k=k)
    logits = torch.randn(22, E)
    padding = torch.arange(22) >= 18
    taken = torch.zeros(22, E).scatter(1, *_chosen(gate.route(logits, padding)))
    capacity = math.ceil(k * 18 / E)
    for e in range(E):
        best = sorted(range(18), key=lambda s: -logits[s, e].item())[:capacity]
        assert taken[:, e].nonzero().flatten().tolist() == sorted(best)


def _chosen(routing):
    runs = ~routing.unrouted()
    return routing.expert_index, runs.float()


def test_thresholds_are_bias_corrected_averages_of_each_updates_mean_cut_off():
    gate = build_gate("expert_threshold", 5, E, top_k=2, threshold_decay=0.9, warmup_updates=2).double()
    averages = [0.0] * E
    for update in range(5):
        sums, tokens = [0.0] * E, 0
        for size in (9, 4, 0):  # micro-batches
            logits = torch.randn(size, E, dtype=torch.float64, requires_grad=True)
            padding = torch.arange(size) == 1
            gate.route(logits, padding).combine_weight.sum().backward()
            real = size - (size > 1)
            for e in range(E) if real else ():
                ordered = sorted((logits[s, e].item() for s in range(size) if s != 1), reverse=True)
                sums[e] += real * ordered[math.ceil(2 * real / E) - 1]
            tokens += real
        update_step_states(gate)
        averages = [0.9 * a + 0.1 * s / tokens for a, s in zip(averages, sums)]
        expected = [a / (1 - 0.9 ** (update + 1)) for a in averages]
        assert gate.threshold.value.tolist() == pytest.approx(expected, rel=1e-12)
    assert gate.threshold.updates == 5


def test_updates_without_tokens_and_failed_steps_do_not_change_thresholds():
    gate = build_gate("expert_threshold", 5, E)
    logits = torch.randn(6, E, requires_grad=True)
    gate.route(logits, torch.ones(6, dtype=torch.bool)).combine_weight.sum().backward()
    update_step_states(gate)
    gate.route(logits).combine_weight.sum().backward()
    reset_step_states(gate)
    update_step_states(gate)
    assert gate.threshold.updates == 0 and not gate.threshold.value.any()


@pytest.mark.parametrize("recompute", [False, True])
def test_thresholds_also_follow_batches_of_which_no_expert_takes_a_token(recompute):
    layer = build_moe_layer("expert_threshold", 5, 7, E, threshold_decay=0.9, warmup_updates=0).double()
    layer.gate.threshold.value.fill_(50.0)
    layer.gate.threshold.updates.fill_(1000)  # of an earlier training on other data
    x, padding = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) == 2
    x.requires_grad_()
    real = [token for token, pad in zip(x.detach(), padding) if not pad]
    cutoffs = [sorted((logits_of(layer, token)[e].item() for token in real), reverse=True)[1] for e in range(E)]  # ceil(7 / 4)
    output = checkpoint(layer, x, padding, use_reentrant=False) if recompute else layer(x, padding)
    assert not output.any()
    output.sum().backward()
    (layer(x, padding).sum() * 0).backward()  # fairseq's way to ignore a dummy batch
    layer.eval()(x, padding).sum().backward()
    update_step_states(layer)
    assert layer.gate.threshold.value.tolist() == pytest.approx([0.9 * 50 + 0.1 * cutoff for cutoff in cutoffs], rel=1e-9)


def test_a_batch_counts_once_in_a_layer():
    layer = build_moe_layer("expert_threshold", 5, 7, E).double()
    for size in (8, 5):
        layer(torch.randn(size, 5, dtype=torch.float64)).sum().backward()
    assert layer.gate.threshold.pending[-1] == 13


def test_loads_are_balanced_at_inference_once_thresholds_have_converged():
    torch.manual_seed(0)
    gate = build_gate("expert_threshold", 6, E, top_k=2, threshold_decay=0.9, warmup_updates=5)
    gate.projection.weight.data.normal_()
    for _ in range(40):
        gate(torch.randn(200, 6) + 1).combine_weight.sum().backward()
        update_step_states(gate)
    counts = gate.eval()(torch.randn(4000, 6) + 1).chosen_count().squeeze(0) / 4000
    assert counts.tolist() == pytest.approx([2 / E] * E, abs=0.05)


@pytest.mark.parametrize("options, message", [
    (dict(threshold_decay=1.0), "threshold_decay=1.0 must be at least 0 and below 1"),
    (dict(warmup_updates=-1), "warmup_updates=-1 must be at least 0"),
    (dict(top_k=5), "top_k=5 must lie between 1 and num_experts=4"),
])  # fmt: skip
def test_out_of_range_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_gate("expert_threshold", 4, E, **options)
