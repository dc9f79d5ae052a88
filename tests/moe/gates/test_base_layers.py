"""BASE layers: the assignment compared with all balanced assignments, the weights with the sigmoid."""

import itertools
import math
import sys

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates import base_layers
from fairseq_sparsemixer.moe.gates.base_layers import (
    assign_by_auction,
    assign_by_scipy,
    assign_by_size,
    balanced_assignment,
    base_routing,
    find_assignment,
)

needs_libbase = pytest.mark.skipif(not base_layers.works("fairseq.libbase"), reason="fairseq.libbase is missing or does not load")
needs_scipy = pytest.mark.skipif(not base_layers.works("scipy.optimize"), reason="scipy is missing")
SOLVERS = [
    pytest.param(assign_by_auction, marks=needs_libbase),
    pytest.param(assign_by_scipy, marks=needs_scipy),
    pytest.param(assign_by_size, marks=[needs_libbase, needs_scipy]),
]


def best_total(scores):
    """The largest sum of scores [N][E] over all assignments with at most ceil(N / E) tokens per expert."""
    num_tokens, num_experts = len(scores), len(scores[0])
    most = math.ceil(num_tokens / num_experts)
    return max(
        sum(scores[s][e] for s, e in enumerate(assignment))
        for assignment in itertools.product(range(num_experts), repeat=num_tokens)
        if max(assignment.count(e) for e in range(num_experts)) <= most
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens, num_experts", [(6, 3), (8, 2), (7, 3), (1, 4), (5, 1)])
def test_the_assignment_is_balanced_and_optimal(solver, tokens, num_experts):
    logits = torch.randn(tokens + 2, num_experts)
    padding = torch.zeros(tokens + 2, dtype=torch.bool)
    padding[[0, -1]] = True
    expert = balanced_assignment(logits, padding, solver).squeeze(1)[~padding]
    assert torch.bincount(expert, minlength=num_experts).max().item() <= math.ceil(tokens / num_experts)
    total = logits[~padding].gather(1, expert.unsqueeze(1)).sum().item()
    slack = (
        1e-5 if solver is assign_by_scipy else tokens * (logits.max() - logits.min()).item() / 50
    )  # the size of the auction's bids
    assert total == pytest.approx(best_total(logits[~padding].double().tolist()), abs=slack)


@needs_libbase
@needs_scipy
def test_auction_and_scipy_reach_the_same_total_on_a_larger_batch():
    logits = torch.randn(256, 8)
    totals = [
        logits.gather(1, balanced_assignment(logits, None, solver)).sum().item()
        for solver in (assign_by_auction, assign_by_scipy)
    ]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)  # the auction's bids differ by 1/50 of the range


EXTREME = {
    "both ends of float32": lambda x: torch.where(x > 0, 3e38, -3e38),
    "infinite": lambda x: torch.where(x > 1, math.inf, torch.where(x < -1, -math.inf, x)),
    "all infinite": lambda x: torch.full_like(x, math.inf),
    "one infinite": lambda x: torch.where(x == x.max(), math.inf, x),
    "far from zero": lambda x: x + 1e8,
    "large": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-38,
    "equal": torch.zeros_like,
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", EXTREME)
def test_extreme_logits_give_a_balanced_and_nearly_optimal_assignment(solver, name):
    logits = EXTREME[name](torch.randn(61, 4))
    expert = balanced_assignment(logits, None, solver).squeeze(1)
    assert torch.bincount(expert, minlength=4).max().item() <= 16
    scores = torch.nan_to_num(logits).double()
    best = scores.gather(1, assign_by_scipy(scores).unsqueeze(1)).sum() if base_layers.works("scipy.optimize") else -math.inf
    slack = 0.04 * 61 * (scores.max() - scores.min())  # twice the auction's guarantee
    assert scores.gather(1, expert.unsqueeze(1)).sum() >= best - slack - 1e-9 * scores.abs().sum()


@needs_libbase
@pytest.mark.parametrize("scale, shift", [(1, 0), (100, -50), (1e-3, 0.1), (1, 900)])
def test_ordinary_logits_reach_the_auction_unchanged(scale, shift):
    logits = torch.randn(64, 8) * scale + shift
    assert torch.equal(base_layers.within_reach(logits), logits)


@needs_scipy
@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_with_more_experts_than_tokens_each_token_gets_its_own_expert(tokens):
    expert = balanced_assignment(torch.randn(tokens, 1024), None, find_assignment()).squeeze(1)
    assert len(set(expert.tolist())) == tokens


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_collapsed_router_with_nan_logits_is_still_balanced(solver):
    same = torch.zeros(12, 4)
    same[:, 1] = 5
    same[3, 2] = math.nan
    assert torch.bincount(balanced_assignment(same, None, solver).squeeze(1), minlength=4).tolist() == [3, 3, 3, 3]


def test_inference_is_greedy_and_the_weight_is_the_sigmoid():
    logits = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    routing = base_routing(logits)
    for s, row in enumerate(logits.tolist()):
        assert routing.expert_index[s].item() == row.index(max(row))
        assert routing.combine_weight[s].item() == pytest.approx(1 / (1 + math.exp(-max(row))))
    assert "balance" not in routing.aux_losses
    few = logits[:8].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: base_routing(x, assign=find_assignment()).combine_weight, few)


def test_gate_balances_in_training_only():
    gate = build_gate("base", 6, 4)
    tokens = torch.randn(40, 6) + 1
    assert torch.bincount(gate(tokens).expert_index.flatten(), minlength=4).tolist() == [10] * 4
    gate.eval()
    assert torch.equal(gate(tokens).expert_index, gate.logits(tokens).argmax(-1, keepdim=True))


@pytest.mark.parametrize("there, solver", [
    ({"fairseq.libbase", "scipy.optimize"}, assign_by_size),
    ({"fairseq.libbase"}, assign_by_auction),
    ({"scipy.optimize"}, assign_by_scipy),
])  # fmt: skip
def test_the_available_solver_is_used(monkeypatch, there, solver):
    monkeypatch.setattr(base_layers, "works", there.__contains__)
    assert find_assignment() is solver


def test_without_a_solver_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(base_layers, "works", lambda module: False)
    with pytest.raises(ValueError, match="router=base needs a linear assignment solver: install scipy"):
        find_assignment()


@pytest.mark.parametrize("error", ["ImportError('undefined symbol: _ZNK3c1010TensorImpl')", "OSError('no such library')"])
def test_a_module_that_does_not_load_counts_as_missing(tmp_path, monkeypatch, error):
    (tmp_path / "broken_extension.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    assert not base_layers.works("broken_extension") and not base_layers.works("no_such_module") and base_layers.works("json")
    assert "broken_extension" not in sys.modules


def test_the_experts_embeddings_start_orthogonal():
    weight = build_gate("base", 16, 4).projection.weight
    torch.testing.assert_close(weight @ weight.t(), 0.01 * torch.eye(4))  # gain 0.1, as in fairseq's BaseLayer


@pytest.mark.parametrize("tokens, solver", [(3, "scipy"), (8, "scipy"), (9, "auction"), (40, "auction")])
def test_up_to_two_places_per_expert_go_to_scipy_and_more_to_the_auction(tokens, solver, monkeypatch):
    monkeypatch.setattr(base_layers, "assign_by_scipy", lambda scores: "scipy")
    monkeypatch.setattr(base_layers, "assign_by_auction", lambda scores: "auction")
    assert assign_by_size(torch.randn(tokens, 4)) == solver


@pytest.mark.parametrize("shift", [-1e8, 1e8])
def test_logits_far_from_zero_keep_their_differences_within_reach_of_the_auction(shift):
    logits = torch.randn(64, 8, dtype=torch.float64) + shift
    near = base_layers.within_reach(logits)
    assert near.abs().max() <= 1000 * (logits.max() - logits.min())
    torch.testing.assert_close(near - near[0, 0], logits - logits[0, 0], rtol=0, atol=1e-6)
