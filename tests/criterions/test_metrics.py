"""Router metrics against counts by hand, and their aggregation over shards of a batch."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import metrics
from fairseq_sparsemixer.criterions.metrics import log_routing_metrics, routing_log, sum_routing_logs

from fairseq_sparsemixer.moe.gates import Routing


def routing(experts, num_experts=5, dropped=None, balance=1.0):
    """Token t goes to experts[t] with probability one half; the next expert has the other half."""
    index = torch.tensor(experts).unsqueeze(1)
    probabilities = torch.zeros(len(experts), num_experts).scatter(1, index, 0.5)
    probabilities = probabilities.scatter_add(1, (index + 1) % num_experts, torch.full(index.shape, 0.5))
    losses = {"balance": torch.tensor(balance), "router_z": torch.tensor(2.0)}
    dropped = None if dropped is None else torch.tensor(dropped).unsqueeze(1)
    return Routing(index, torch.ones(index.shape), losses, probabilities, dropped=dropped)


def figures(logs):
    with metrics.aggregate(new_root=True) as agg:
        log_routing_metrics(sum_routing_logs(logs), sum(log["sample_size"] for log in logs))
    return agg.get_smoothed_values()


def log_of(routings, sample_size):
    return {**routing_log([SimpleNamespace(routing=r) for r in routings], sample_size), "sample_size": sample_size}


def test_metrics_are_means_over_layers_and_losses_are_sums():
    found = figures([log_of([routing([0, 0, 0, 1]), routing([0, 1, 2, 3], balance=3.0)], 4)])
    assert found["moe_gate_loss"] == pytest.approx(4)
    assert found["moe_z_loss"] == pytest.approx(4)
    assert found["entropy_gating"] == pytest.approx(math.log(2), abs=1e-3)
    assert found["expert1_balance_top"] == pytest.approx((75 + 25) / 2)  # the top fifth of five experts is one expert
    assert found["expert1_balance_bottom"] == 0
    assert found["unused_expert1_count"] == pytest.approx((3 + 1) / 2)
    assert found["overflow_expert1"] == 0
    assert found["moe_argmax_share"] == found["moe_experts_per_token"] == 1
    assert found["moe_load_max"] == pytest.approx((3 / 0.8 + 1 / 0.8) / 2, abs=0.01)
    assert found["moe_load_min"] == 0


def test_dropped_tokens_count_as_overflow_and_not_as_load():
    found = figures([log_of([routing([0, 0, 1, 1], dropped=[True, False, False, False])], 4)])
    assert found["overflow_expert1"] == 25
    assert found["moe_experts_per_token"] == 0.75
    assert found["expert1_balance_top"] == pytest.approx(200 / 3, abs=0.01)


def test_shards_of_a_batch_give_the_metrics_of_the_whole():
    """Shards are accumulated batches or ranks. Only the balance loss differs: it is each shard's own, weighted by size."""
    experts = [0, 3, 3, 1, 4, 4, 4, 0, 2]
    whole = figures([log_of([routing(experts, balance=2.0)], 9)])
    shards = figures([log_of([routing(experts[:2], balance=2.0)], 2), log_of([routing(experts[2:], balance=2.0)], 7)])
    assert shards == whole
    uneven = figures([log_of([routing(experts[:3], balance=1.0)], 3), log_of([routing(experts[3:], balance=4.0)], 6)])
    assert uneven["moe_gate_loss"] == pytest.approx((1 * 3 + 4 * 6) / 9)


def test_padding_is_not_counted():
    padded = replace(routing([0, 1, 1]), padding_mask=torch.tensor([False, False, True]))
    assert figures([log_of([padded], 2)]) == figures([log_of([routing([0, 1])], 2)])


def test_the_second_choice_has_its_own_metrics():
    first = replace(routing([0, 1, 2, 3]), expert_index=torch.tensor([[0, 4], [1, 4], [2, 4], [3, 4]]))
    found = figures([log_of([first], 4)])
    assert (found["expert1_balance_top"], found["expert2_balance_top"]) == (25, 100)
    assert (found["unused_expert1_count"], found["unused_expert2_count"]) == (1, 4)


def test_an_empty_batch_logs_zeros_not_nan():
    empty = replace(routing([0]), padding_mask=torch.tensor([True]))
    found = figures([log_of([empty], 0)])
    assert all(math.isfinite(value) for value in found.values())


def test_a_dense_model_has_no_metrics():
    assert sum_routing_logs([{"loss": 1.0, "sample_size": 3}]) == {}


def test_the_least_used_experts_have_their_own_metrics():
    found = figures([log_of([routing([0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 4])], 12)])  # loads 4, 3, 2, 1, 2
    assert found["expert1_balance_top"] == pytest.approx(100 * 4 / 12, abs=0.01)
    assert found["expert1_balance_bottom"] == pytest.approx(100 * 1 / 12, abs=0.01)
    assert found["moe_load_max"] == pytest.approx(4 / 2.4, abs=0.01)
    assert found["moe_load_min"] == pytest.approx(1 / 2.4, abs=0.01)


def test_layers_with_different_numbers_of_experts_are_measured_each_by_its_own():
    small, large = routing([0, 0, 1], num_experts=2), routing([0, 1, 2], num_experts=5)
    alone = [figures([log_of([one], 3)]) for one in (small, large)]
    both = figures([log_of([small, large], 3)])
    for name in ("moe_load_max", "moe_load_min", "expert1_balance_top", "expert1_balance_bottom", "unused_expert1_count"):
        assert both[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, abs=0.01), name


def test_loads_of_different_numbers_of_experts_add_up_over_batches():
    logs = [log_of([routing([0, 1, 1], num_experts=2), routing([4, 4, 0], num_experts=5)], 3) for _ in range(2)]
    load = sum_routing_logs(logs)["load"].sum(1)  # [L, E]
    assert load[0, :2].tolist() == [2, 4] and load[0, 2:].isnan().all() and load[1].tolist() == [2, 0, 0, 0, 4]


def test_the_layers_own_figures_are_those_of_each_alone():
    """The figures of a layer are those that a model of only this layer would log."""
    routings = {"encoder.layers.0": routing([0, 0, 0, 1]), "decoder.layers.1": routing([0, 1, 2, 3, 0], num_experts=4)}
    log = log_of(list(routings.values()), 4)
    with metrics.aggregate(new_root=True) as agg:
        log_routing_metrics(sum_routing_logs([log]), 4, list(routings))
    found = agg.get_smoothed_values()
    for layer, alone in routings.items():
        own = figures([log_of([alone], 4)])
        assert {name: found[f"{layer}/{name}"] for name in own} == own
    assert len(found) == 3 * len(own)
