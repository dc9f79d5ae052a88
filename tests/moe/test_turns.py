"""Turns: ranks that share experts may run layers in any order and number, and compute the same as alone."""

import random

import pytest
import torch
from ranks import rank_number, run_ranks
from torch import nn

from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group
from fairseq_sparsemixer.moe.turns import balancing_alone, taking_turns

M, H, E, LAYERS = 4, 6, 4, 3
OPTIONS = {
    "switch": {},
    "topk": {"top_k": 2, "eval_capacity_factor": 1.0},  # dispatched in blocks of equal size
    "expert_threshold": {},
    "hash": {},
}


def model(router: str) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(build_moe_layer(router, M, H, E, **OPTIONS[router]).double() for _ in range(LAYERS)).eval()


def calls(rank: int, order: str):
    """The layers that a rank runs, and their tokens."""
    if order == "one rank idle":
        layers = [] if rank else [0, 1, 2, 2]
    elif order == "backwards":
        layers = [0, 1, 2] if rank else [2, 1, 0, 0]
    else:
        layers = random.Random(rank).choices(range(LAYERS), k=5 + 7 * rank)
    return [
        (layer, torch.randn(3 + rank, M, generator=torch.Generator().manual_seed(step)).double())
        for step, layer in enumerate(layers)
    ]


def run(router: str, order: str):
    """Largest difference to layers with all experts, over the rank's calls and over one forward of all ranks afterwards."""
    whole, shared, rank = model(router), model(router), rank_number()
    shard_experts(shared, form_expert_group(2))
    worst = 0.0
    with torch.no_grad():
        with taking_turns(shared):
            for layer, tokens in calls(rank, order):
                output = shared[layer](tokens)
                routing = shared[layer].routing
                worst = max(worst, float((output - whole[layer](tokens)).abs().max()))
                assert len(routing.expert_index) == len(tokens)
        for layer in shared:
            before = layer.routing
            if order == "one rank idle" and rank:
                assert before is None, "joining leaves the layer's last routing alone"
        tokens = torch.ones(2, M).double()
        worst = max(worst, float((shared[0](tokens) - whole[0](tokens)).abs().max()))
    return worst


@pytest.mark.distributed
@pytest.mark.parametrize("order", ["one rank idle", "backwards", "at random"])
@pytest.mark.parametrize("router", OPTIONS)
def test_ranks_in_any_order_compute_the_same_as_alone(router, order):
    assert max(run_ranks(2, run, router, order, deadline=30)) < 1e-12


def test_layers_with_all_experts_wait_for_nobody():
    layers = model("switch")
    with taking_turns(layers):
        assert all(layer.turns is None for layer in layers)


def test_balance_scopes_return_after_an_error():
    layers, scope = model("switch"), RanksScope("everyone")
    for layer in layers:
        layer.gate.balance_scope = scope
    with pytest.raises(ZeroDivisionError), balancing_alone(layers):
        assert all(layer.gate.balance_scope is None for layer in layers)
        raise ZeroDivisionError
    assert all(layer.gate.balance_scope is scope for layer in layers)
