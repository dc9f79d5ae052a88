"""Plain top-k, compared with its formulas token by token."""

import math

import pytest
import torch

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.topk import topk_routing

S, E = 40, 8


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def sigmoid(row):
    return [1 / (1 + math.exp(-x)) for x in row]


SCORES = {"softmax": softmax, "sigmoid": sigmoid}


def reference(row, k, score, weights, scale, groups, kept, bias):
    """{expert: weight} of one token."""
    scores = SCORES[score](row)
    biased = [value + b for value, b in zip(scores, bias)]
    size = len(row) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    worth = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in members]
    best = sorted(range(groups), key=lambda group: -worth[group])[:kept]
    allowed = [e for group in best for e in members[group]]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
    total = sum(scores[e] for e in chosen) if weights == "normalised" else 1
    return {e: scale * scores[e] / total for e in chosen}


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize("weights", ["normalised", "raw"])
@pytest.mark.parametrize(
    "k, scale, groups, kept", [(1, 1.0, 1, 1), (2, 2.5, 4, 2), (3, 1.0, 2, 1), (8, 1.0, 8, 8), (2, 1.0, 8, 2)]
)
def test_experts_and_weights_equal_the_formula(score, weights, k, scale, groups, kept):
    logits, bias = torch.randn(S, E, dtype=torch.float64), torch.randn(E, dtype=torch.float64) / 5
    routing = topk_routing(logits, None, k, score, weights, scale, groups, kept, bias=bias)
    for row, experts, values in zip(logits.tolist(), routing.expert_index.tolist(), routing.combine_weight.tolist()):
        expected = reference(row, k, score, weights, scale, groups, kept, bias.tolist())
        assert set(experts) == set(expected)
        for expert, value in zip(experts, values):
            assert math.isclose(value, expected[expert], rel_tol=1e-12)


def test_the_router_gradient_equals_that_of_normalised_sigmoid_scores():
    logits = torch.randn(S, E, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(S, 2, dtype=torch.float64)
    routing = topk_routing(logits, None, 2, "sigmoid")
    (found,) = torch.autograd.grad((routing.combine_weight * upstream).sum(), logits)
    for token in range(S):
        a, b = routing.expert_index[token].tolist()
        score = sigmoid(logits[token].tolist())
        total = score[a] + score[b]
        # d/ds_a of s_a / (s_a + s_b) = s_b / total^2, and of s_b / (s_a + s_b) = -s_b / total^2
        expected = [0.0] * E
        difference = (upstream[token, 0] - upstream[token, 1]).item()
        expected[a] = difference * score[b] / total**2 * score[a] * (1 - score[a])
        expected[b] = -difference * score[a] / total**2 * score[b] * (1 - score[b])
        torch.testing.assert_close(found[token], torch.tensor(expected, dtype=torch.float64))


def test_the_balance_loss_of_sigmoid_scores_counts_all_choices():
    logits = torch.randn(S, E, dtype=torch.float64)
    routing = topk_routing(logits, None, 2, "sigmoid")
    share, mean = [0.0] * E, [0.0] * E
    for row, experts in zip(logits.tolist(), routing.expert_index.tolist()):
        for expert in experts:
            share[expert] += 1 / (2 * S)
        scores = sigmoid(row)
        mean = [m + score / sum(scores) / S for m, score in zip(mean, scores)]
    expected = E * sum(f * p for f, p in zip(share, mean))
    assert math.isclose(routing.aux_losses["balance"].item(), expected, rel_tol=1e-12)


def test_a_single_expert_has_weight_one():
    routing = topk_routing(torch.randn(5, 1), None, 1)
    assert (routing.expert_index == 0).all() and (routing.combine_weight == 1).all()


def test_the_selection_bias_changes_the_choice_but_not_the_weights():
    gate = build_gate("topk", 4, 4, top_k=1, router_score="sigmoid", router_weights="raw", bias_update_rate=0.1)
    gate.balancer.bias += torch.tensor([0.0, 0.0, 0.0, 5.0])
    tokens = torch.randn(9, 4)
    routing = gate(tokens)
    assert (routing.expert_index == 3).all()
    torch.testing.assert_close(routing.combine_weight[:, 0], gate.logits(tokens)[:, 3].sigmoid())


@pytest.mark.parametrize("options, message", [
    ({"top_k": 9}, "top_k=9 must lie between 1 and num_experts=8"),
    ({"router_score": "tanh"}, "router_score=tanh must be softmax or sigmoid"),
    ({"router_weights": "sum"}, "router_weights=sum must be normalised or raw"),
    ({"router_scale": 0.0}, "router_scale=0.0 must be positive"),
    ({"router_groups": 3}, "router_groups=3 must divide num_experts=8"),
    ({"router_groups": 4, "router_topk_groups": 5}, "router_topk_groups=5 must lie between 1 and router_groups=4"),
    ({"top_k": 3, "router_groups": 4, "router_topk_groups": 1}, "leaves a token 2 experts, fewer than top_k=3"),
])  # fmt: skip
def test_out_of_range_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_gate("topk", 4, E, **options)


def test_scores_that_are_all_zero_leave_the_losses_finite():
    logits = torch.full((3, E), -200.0, requires_grad=True)  # the sigmoid is 0 in float32
    routing = topk_routing(logits, None, 2, score="sigmoid")
    sum(routing.aux_losses.values()).backward()
    assert routing.aux_losses["balance"] == 0 and not routing.combine_weight.any()
    assert logits.grad.isfinite().all()
