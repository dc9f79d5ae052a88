"""The selection bias: its effect on selection, and its updates."""

import math
import multiprocessing

import pytest
import torch
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates import reset_step_states, routers_with, update_step_states
from fairseq_sparsemixer.moe.gates.bias import SelectionBias
from fairseq_sparsemixer.moe.gates.sparsemixer import mask_unlikely

BIASED = routers_with("bias_update_rate")


def skewed_layer(router="switch", **options):
    """A layer with tokens [S, M] that mostly go to expert 0."""
    layer = build_moe_layer(router, 4, 8, 4, bias_update_rate=0.25, **options)
    with torch.no_grad():
        layer.gate.projection.weight.copy_(torch.eye(4))
    x = torch.randn(64, 4)
    x[:, 0] += 2
    return layer, x


def run(layer, x, padding=None):
    layer(x, padding).square().sum().backward()


def load(layer):
    return layer.routing.chosen_count().sum(0)


def test_the_bias_steps_against_the_sign_of_the_excess_load():
    layer, x = skewed_layer()
    run(layer, x)
    first = load(layer).tolist()
    run(layer, x.flip(1))  # a second micro-batch
    total = [a + b for a, b in zip(first, load(layer).tolist())]
    update_step_states(layer)
    mean = sum(total) / 4
    assert layer.gate.selection_bias.tolist() == [0.25 * ((mean > n) - (mean < n)) for n in total]
    before = layer.gate.selection_bias.clone()
    update_step_states(layer)  # nothing ran since, so nothing changes
    assert torch.equal(layer.gate.selection_bias, before)


@pytest.mark.parametrize("router", BIASED)
def test_the_bias_affects_selection_but_not_weights(router):
    gate = build_gate(router, 4, 4, bias_update_rate=1.0).eval()
    unbiased = build_gate(router, 4, 4).eval()
    logits = torch.randn(30, 4, dtype=torch.float64)
    logits[:, :3] += 6  # far from zero, where SparseMixer's mask removes no expert
    logits[:, 3] = logits[:, :3].amax(1) - 0.05  # second best without the bias
    gate.balancer.bias[3] = 0.1
    routing, plain = gate.route(logits), unbiased.route(logits)
    assert (routing.expert_index[:, 0] == 3).all() and (plain.expert_index[:, 0] != 3).all()
    torch.testing.assert_close(routing.probabilities, plain.probabilities)
    if router in ("switch", "dense_st"):
        torch.testing.assert_close(routing.combine_weight[:, 0], logits.softmax(-1)[:, 3])
    if router in ("noisy_topk", "gshard"):  # for tokens with the same two experts in swapped order
        same = (routing.expert_index == plain.expert_index.flip(1)).all(1)
        assert same.sum() > 20
        torch.testing.assert_close(routing.combine_weight[same], plain.combine_weight.flip(1)[same])
    if router.startswith("sparsemixer"):
        torch.testing.assert_close(routing.combine_weight[:, 0], mask_unlikely(logits, 0.1).softmax(-1)[:, 3])


@pytest.mark.parametrize("router", BIASED)
def test_a_skewed_router_is_balanced_by_its_bias(router):
    layer, x = skewed_layer(router, **({"jitter_eps": 10.0} if "sparsemixer" in router else {}))  # no mask
    layer.gate.balancer.rate = 0.02 if router == "topk" else 0.1  # topk adds it to scores, which lie in [0, 1]

    def excess():
        run(layer, x)
        return (load(layer).max() / load(layer).mean()).item()

    before = excess()
    for _ in range(60):
        update_step_states(layer)
        after = excess()
    assert after - 1 < (before - 1) / 2


def test_validation_recomputation_and_dummy_batches_are_not_counted():
    layer, x = skewed_layer()
    checkpoint(layer, x.requires_grad_(), use_reentrant=False).sum().backward()
    once = load(layer)
    assert torch.equal(layer.gate.balancer.pending, once)  # recomputed in the backward, counted once
    layer.eval()(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    (layer(x).sum() * 0).backward()  # fairseq's way to ignore a dummy batch
    assert torch.equal(layer.gate.balancer.pending, once)


def test_padding_is_not_counted_and_dropped_tokens_are():
    layer, x = skewed_layer(capacity_factor=0.5)
    run(layer, x, torch.arange(64) >= 40)
    assert layer.gate.balancer.pending.sum().item() == 40
    assert layer.routing.statistics()["load"].sum().item() < 40


def test_the_load_of_a_failed_step_is_discarded():
    layer, x = skewed_layer()
    run(layer, x)
    reset_step_states(layer)
    update_step_states(layer)
    assert layer.gate.selection_bias.tolist() == [0, 0, 0, 0]


def test_the_bias_is_saved_and_stays_float32_in_half_precision():
    layer, x = skewed_layer()
    run(layer, x)
    update_step_states(layer)
    restored = build_moe_layer("switch", 4, 8, 4, bias_update_rate=0.25).half()
    restored.load_state_dict(layer.state_dict())
    assert restored.gate.selection_bias.dtype == torch.float32 and restored.gate.projection.weight.dtype == torch.float16
    assert torch.equal(restored.gate.selection_bias, layer.gate.selection_bias)
    assert "gate.balancer.bias" in layer.state_dict() and not any("load" in name for name in layer.state_dict())


def test_rate_zero_means_no_bias_and_invalid_rates_are_refused():
    assert build_gate("switch", 4, 4).selection_bias is None
    with pytest.raises(ValueError, match="bias_update_rate=-1 must be at least 0 and finite"):
        SelectionBias(4, -1)
    for rate in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"bias_update_rate={rate} must be at least 0 and finite"):
            build_gate("switch", 4, 4, bias_update_rate=rate)
    with pytest.raises(ValueError, match="bias_update_rate=-1 must be at least 0 and finite"):
        build_gate("switch", 4, 4, bias_update_rate=-1)


def _one_rank(rank, file, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = torch.nn.ModuleList([build_gate("switch", 4, 3, bias_update_rate=1.0) for _ in range(2)])
    loads = [[[5.0, 0, 0], [1.0, 1, 1]], [[0.0, 3, 4], [1.0, 1, 4]]][rank]
    for gate, counted in zip(model, loads):
        gate.balancer.add(torch.tensor(counted))
    if rank == 1:
        model[1].balancer.forget()  # a layer that did not run on this rank
    update_step_states(model)
    queue.put([gate.selection_bias.tolist() for gate in model])
    dist.destroy_process_group()


def test_the_bias_uses_the_loads_of_all_ranks(tmp_path):
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    ranks = [fork.Process(target=_one_rank, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in ranks:
        process.start()
    results = [queue.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    # loads 5 3 4 with mean 4; and 1 1 1
    assert results[0] == results[1] == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
