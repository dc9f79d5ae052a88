"""Gate.weigh: the weights that a gate gives to experts chosen by others (--moe-replay)."""

import math

import pytest
import torch

from fairseq_sparsemixer.moe.gates import build_gate
from fairseq_sparsemixer.moe.gates.registry import GATES

OPTIONS = [(name, {}) for name in sorted(GATES)] + [
    ("topk", {"router_score": "sigmoid", "router_weights": "raw", "router_scale": 2.5}),
    ("sinkhorn", {"top_k": 2}),
    ("dense_st", {"top_k": 2, "renormalise": True}),
]


@pytest.mark.parametrize("router, options", OPTIONS)
def test_a_gates_own_choice_gets_its_own_weights(router, options):
    gate = build_gate(router, 8, 5, **options).eval()
    tokens = torch.randn(40, 8)
    logits = gate.logits(tokens)
    routing = gate.route(logits)
    weight = gate.weigh(logits, routing.expert_index, routing.skipped)
    expected = routing.combine_weight
    if routing.skipped is not None:
        weight, expected = (value.masked_fill(routing.skipped, 0) for value in (weight, expected))
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("router", ["switch", "topk", "gshard", "noisy_topk", "sparsemixer", "sparsemixer_v2", "remoe"])
def test_any_experts_get_weights_that_carry_the_routers_gradient(router):
    gate = build_gate(router, 8, 5, **({"jitter_eps": math.inf} if "sparsemixer" in router else {}))  # no expert is masked
    logits = gate.logits(torch.randn(30, 8)).abs().detach().requires_grad_()
    choice = torch.stack([torch.randperm(5)[: gate.top_k] for _ in range(30)])
    weight = gate.weigh(logits, choice)
    assert weight.shape == choice.shape and (weight > 0).all()
    (gradient,) = torch.autograd.grad((weight * torch.rand_like(weight)).sum(), logits)
    assert gradient.ne(0).any(1).all()


def test_experts_that_a_trace_lacks_take_no_part_in_the_normalisation():
    gate = build_gate("topk", 8, 5, top_k=2)
    logits = torch.randn(6, 5)
    skipped = torch.tensor([[False, True]]).expand(6, 2)
    weight = gate.weigh(logits, torch.tensor([[3, 0]]).expand(6, 2), skipped)
    assert (weight[:, 0] == 1).all()
