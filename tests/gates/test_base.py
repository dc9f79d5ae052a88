"""BASE layers: the assignment against every balanced assignment there is, the weights against sigmoid."""

import builtins
import itertools
import math

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.gates.base import assign_by_auction, assign_by_scipy, balanced_assignment, base_routing, find_assignment

SOLVERS = [assign_by_auction, assign_by_scipy]


def best_total(scores):
    """The largest sum of scores [N][E] among all assignments of ceil(N / E) tokens at most to each expert."""
    num_tokens, num_experts = len(scores), len(scores[0])
    most = math.ceil(num_tokens / num_experts)
    return max(
        sum(scores[s][e] for s, e in enumerate(assignment))
        for assignment in itertools.product(range(num_experts), repeat=num_tokens)
        if max(assignment.count(e) for e in range(num_experts)) <= most
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tokens, num_experts", [(6, 3), (8, 2), (7, 3), (1, 4), (5, 1)])
def test_assignment_is_balanced_and_the_best_of_all(solver, tokens, num_experts):
    logits = torch.randn(tokens + 2, num_experts)
    padding = torch.zeros(tokens + 2, dtype=torch.bool)
    padding[[0, -1]] = True
    expert = balanced_assignment(logits, padding, solver).squeeze(1)[~padding]
    assert torch.bincount(expert, minlength=num_experts).max().item() <= math.ceil(tokens / num_experts)
    total = logits[~padding].gather(1, expert.unsqueeze(1)).sum().item()
    slack = tokens * (logits.max() - logits.min()).item() / 50 if solver is assign_by_auction else 1e-5  # the size of its bids
    assert total == pytest.approx(best_total(logits[~padding].double().tolist()), abs=slack)


def test_auction_and_scipy_reach_the_same_total_on_a_larger_batch():
    logits = torch.randn(256, 8)
    totals = [logits.gather(1, balanced_assignment(logits, None, solver)).sum().item() for solver in SOLVERS]
    assert totals[0] == pytest.approx(totals[1], rel=1e-2)  # the auction's bids differ by 1/50 of the range


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_collapsed_router_and_undefined_logits_still_balance(solver):
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
    assert torch.autograd.gradcheck(lambda x: base_routing(x, assign=assign_by_scipy).combine_weight, few)


def test_gate_balances_in_training_only():
    gate = build_gate("base", 6, 4)
    tokens = torch.randn(40, 6) + 1
    assert torch.bincount(gate(tokens).expert_index.flatten(), minlength=4).tolist() == [10] * 4
    gate.eval()
    assert torch.equal(gate(tokens).expert_index, gate.logits(tokens).argmax(-1, keepdim=True))


def test_without_any_solver_one_sentence_tells_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without(*names):
        def no_solver(name, globals=None, locals=None, fromlist=(), level=0):
            if (name == "fairseq" and "libbase" in (fromlist or ()) and "libbase" in names) or name.split(".")[0] in names:
                raise ImportError(name)
            return real_import(name, globals, locals, fromlist, level)

        return no_solver

    assert find_assignment() is assign_by_auction
    monkeypatch.setattr(builtins, "__import__", without("libbase"))
    assert find_assignment() is assign_by_scipy
    monkeypatch.setattr(builtins, "__import__", without("libbase", "scipy"))
    with pytest.raises(ConfigurationError, match="--router base needs a solver .* install scipy"):
        find_assignment()
