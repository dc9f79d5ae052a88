"""Default MoE, compared with its formulas token by token in float64: output, gradients, and updates of the averages."""

import pytest
import torch
from layer_by_hand import assert_computes, outputs_of_all
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.dispatch import dispatch_locally
from fairseq_sparsemixer.moe.gates import reset_step_states, update_step_states

E, M = 4, 5


def layer_with_defaults(**options):
    layer = build_moe_layer("default_moe", M, 7, E, **options).double()
    layer.gate.average.vectors.normal_()
    return layer


def chosen(layer, token, k):
    return (layer.gate.projection.weight @ token).argsort(descending=True)[:k].tolist()


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("training", [True, False])
def test_experts_that_do_not_run_contribute_their_default_outputs(k, training):
    layer = layer_with_defaults(top_k=k).train(training)

    def by_hand(token):
        f, pi = outputs_of_all(layer, token), (layer.gate.projection.weight @ token).softmax(0)
        ran = chosen(layer, token, k)
        return sum(pi[e] * (f[e] if e in ran else layer.gate.average.vectors[e]) for e in range(E))

    assert_computes(layer, torch.randn(20, M, dtype=torch.float64), by_hand, padding=torch.arange(20) % 7 == 3)


def test_a_dropped_choice_contributes_its_default_output_and_is_not_averaged():
    layer = layer_with_defaults(top_k=1, capacity_factor=0.5)
    x = torch.randn(16, M, dtype=torch.float64)
    output = layer(x)
    places, sums, counts = [0] * E, torch.zeros(E, M, dtype=torch.float64), torch.zeros(E)
    for s in range(16):
        (best,) = chosen(layer, x[s], 1)
        runs = places[best] < 2  # 0.5 * 16 / 4
        places[best] += 1
        f, pi = outputs_of_all(layer, x[s]), (layer.gate.projection.weight @ x[s]).softmax(0)
        expected = sum(pi[e] * (f[e] if e == best and runs else layer.gate.average.vectors[e]) for e in range(E))
        torch.testing.assert_close(output[s], expected)
        if runs:
            sums[best] += f[best].detach()
            counts[best] += 1
    assert sum(places) > counts.sum()
    output.sum().backward()
    torch.testing.assert_close(layer.gate.average.pending[:, :-1], sums)
    assert layer.gate.average.pending[:, -1].tolist() == counts.tolist()


def test_the_averages_follow_the_mean_outputs_of_each_update():
    layer = build_moe_layer("default_moe", M, 7, E, top_k=2, default_decay=0.75).double()
    expected = torch.zeros(E, M, dtype=torch.float64)
    for _ in range(4):
        outputs = [[] for _ in range(E)]
        for size in (9, 4):  # micro-batches
            x = torch.randn(size, M, dtype=torch.float64)
            padding = torch.rand(size) < 0.3
            layer(x, padding).square().sum().backward()
            for token in x[~padding]:
                for e in chosen(layer, token, 2):
                    outputs[e].append(outputs_of_all(layer, token)[e].detach())
        update_step_states(layer)
        for e in range(E):
            if outputs[e]:
                expected[e] = 0.75 * expected[e] + 0.25 * sum(outputs[e]) / len(outputs[e])
        torch.testing.assert_close(layer.gate.average.vectors, expected)


def test_the_average_of_an_idle_expert_is_kept():
    layer = layer_with_defaults(top_k=1)
    before = layer.gate.average.vectors.clone()
    (token,) = torch.randn(1, M, dtype=torch.float64)
    layer(token.expand(6, M)).sum().backward()
    update_step_states(layer)
    assert (layer.gate.average.vectors != before).any(1).nonzero().flatten().tolist() == chosen(layer, token, 1)


def test_validation_recomputation_dummy_batches_and_failed_steps_do_not_count():
    layer = layer_with_defaults()
    x = torch.randn(8, M, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    once = layer.gate.average.pending.clone()
    assert once[:, -1].sum() == 8
    layer.eval()(x).sum().backward()
    with torch.no_grad():
        layer.train()(x)
    (layer(x).sum() * 0).backward()  # fairseq's way to ignore a dummy batch
    assert torch.equal(layer.gate.average.pending, once)
    before = layer.gate.average.vectors.clone()
    reset_step_states(layer)
    update_step_states(layer)
    assert torch.equal(layer.gate.average.vectors, before)


def test_rows_that_do_not_run_are_not_averaged_on_a_device():
    """The grouped path has a row for every choice, those of padding last."""
    layer = layer_with_defaults(top_k=2)
    x, padding = torch.randn(10, M, dtype=torch.float64), torch.arange(10) >= 6
    pending = []
    for on_device in (False, True):
        reset_step_states(layer)

        def experts(rows, counts, given=layer.experts):
            if not torch.is_tensor(counts):
                return given(rows, counts)
            ran = given(rows[: counts.sum()], counts.tolist())
            return torch.cat([ran, torch.ones(len(rows) - len(ran), M, dtype=rows.dtype)])

        dispatch_locally(x, layer.gate(x, padding), experts, on_device).sum().backward()
        pending.append(layer.gate.average.pending)
    torch.testing.assert_close(*pending)
    assert pending[0][:, -1].sum() == 12


def test_the_averages_are_in_checkpoints_and_stay_float32_in_half_precision():
    layer = build_moe_layer("default_moe", M, 7, E)
    layer.gate.average.vectors.normal_()
    restored = build_moe_layer("default_moe", M, 7, E).half()
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored.gate.average.vectors, layer.gate.average.vectors)
    output = restored(torch.randn(3, M).half())
    assert output.dtype == torch.float16 and output.isfinite().all()


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_an_out_of_range_decay_is_refused(decay):
    with pytest.raises(ValueError, match=f"default_decay={decay} must be at least 0 and below 1"):
        build_gate("default_moe", M, E, default_decay=decay)
