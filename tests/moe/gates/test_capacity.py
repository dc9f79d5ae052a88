"""Capacity: which tokens are kept and dropped, compared with an explicit queue."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer import Routing, build_gate
from fairseq_sparsemixer.moe.gates.capacity import POLICIES, expert_capacity, limit_capacity, require_capacity_factor


def rank_in_queue(policy, choice, token, weight, largest):
    """The sort key of a choice; the smallest goes first."""
    return {
        "position": (choice, token),
        "probability": (-weight, choice, token),
        "batch": (choice, -largest, token),
    }[policy]


def served_by_hand(expert_index, weights, probabilities, padding, capacity, policy):
    """{(token, choice)} within capacity, one choice at a time."""
    queue = sorted(
        (rank_in_queue(policy, choice, token, weights[token][choice], max(probabilities[token])), token, choice)
        for token, experts in enumerate(expert_index)
        for choice in range(len(experts))
        if not padding[token]
    )
    room, served = [capacity] * len(probabilities[0]), set()
    for _, token, choice in queue:
        expert = expert_index[token][choice]
        if room[expert] > 0:
            room[expert] -= 1
            served.add((token, choice))
    return served


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=60)
@given(st.data())
def test_choices_beyond_capacity_are_dropped_in_the_order_of_the_policy(policy, data):
    num_experts, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    k = data.draw(st.integers(1, num_experts))
    factor = data.draw(st.sampled_from([0.1, 0.5, 1.0, 1.1, 1.25, 2.0, 7.0]))
    expert_index = [data.draw(st.permutations(range(num_experts)))[:k] for _ in range(tokens)]
    padding = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(padding)
    values = st.sampled_from([0.1, 0.25, 0.3, 0.6])  # few, so that there are ties
    weight = torch.tensor(data.draw(table(values, tokens, k)), dtype=torch.float64)
    probabilities = torch.tensor(data.draw(table(values, tokens, num_experts)), dtype=torch.float64)
    routing = Routing(
        torch.tensor(expert_index),
        weight.masked_fill(mask.unsqueeze(-1), 0),
        probabilities=probabilities,
        padding_mask=mask,
    )
    limited = limit_capacity(routing, factor, policy)
    capacity = math.ceil(Fraction(str(factor)) * k * padding.count(False) / num_experts)
    served = served_by_hand(expert_index, weight.tolist(), probabilities.tolist(), padding, capacity, policy)
    for token in range(tokens):
        for choice in range(k):
            kept = (token, choice) in served
            assert limited.combine_weight[token, choice] == (weight[token, choice] if kept else 0)
            assert limited.dropped[token, choice].item() == (not kept and not padding[token])
    sums = limited.statistics()
    assert sums["load"].sum().item() == len(served) and sums["load"].sum(0).max().item() <= capacity
    assert sums["dropped"].sum().item() == k * padding.count(False) - len(served)
    assert routing.dropped is None  # the input routing is unchanged


def table(values, rows, columns):
    """A strategy of lists of lists."""
    return st.lists(st.lists(values, min_size=columns, max_size=columns), min_size=rows, max_size=rows)


def test_batch_priority_keeps_the_most_certain_tokens_and_probability_the_largest_weights():
    logits = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 0.0], [0.0, 0.5]])  # expert 0 has room for two first choices
    kept = {}
    for policy in POLICIES:
        routing = build_gate("topk", 4, 2, top_k=2, capacity_factor=0.5, capacity_policy=policy).route(logits)
        kept[policy] = (~routing.dropped).tolist()
    assert kept == {
        "position": [[True, True], [True, False], [False, False], [True, False]],
        "batch": [[False, False], [True, True], [True, False], [True, False]],
        "probability": [[False, True], [True, False], [True, False], [True, False]],
    }


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="capacity_policy=random is unknown; choose from position, probability, batch"):
        build_gate("switch", 4, 2, capacity_policy="random")


def test_float_rounding_does_not_raise_the_capacity():
    assert 1.1 * 50 > 55 and expert_capacity(50, 1, 1.1).item() == 55
    assert expert_capacity(0, 4, 1.0).item() == 0
    assert expert_capacity(torch.tensor(7), 4, 1.0, top_k=2).item() == 4


def test_infinity_drops_nothing_and_other_factors_must_be_positive():
    assert require_capacity_factor(math.inf) is None and require_capacity_factor(None) is None
    for bad in (0, -1, math.nan):
        with pytest.raises(ValueError, match="capacity_factor=.* must be positive"):
            require_capacity_factor(bad)


def test_padding_takes_no_capacity_and_inference_drops_nothing():
    gate = build_gate("switch", 4, 2, capacity_factor=1.0, jitter_eps=0)
    logits = torch.tensor([[1.0, 0]]).repeat(8, 1)
    padding = torch.arange(8) < 4  # in front, so they would fill the capacity if they counted
    assert gate.route(logits, padding).dropped.squeeze(1).tolist() == [False] * 6 + [True] * 2
    assert gate.eval().route(logits, padding).dropped is None


def test_a_capacity_at_evaluation_drops_there_and_makes_the_gate_depend_on_the_batch():
    gate = build_gate("topk", 4, 2, top_k=1, eval_capacity_factor=1.0)
    logits = torch.tensor([[1.0, 0]]).repeat(8, 1)
    padding = torch.arange(8) < 4
    assert not gate.causal and build_gate("topk", 4, 2).causal
    assert gate.route(logits, padding).dropped is None  # training has no capacity
    routing = gate.eval().route(logits, padding)
    assert routing.dropped.squeeze(1).tolist() == [False] * 6 + [True] * 2
    assert build_gate("topk", 4, 2, eval_capacity_factor=math.inf).causal


@pytest.mark.parametrize("fraction, experts, k", [(0.25, 8, 2), (0.05, 16, 1), (1.0, 4, 2)])
def test_a_token_fraction_of_fairseqs_branch_is_a_factor_of_it_times_experts_by_choices(fraction, experts, k):
    for tokens in range(1, 60):
        factor = fraction * experts / k
        assert expert_capacity(tokens, experts, factor, k).item() == math.ceil(Fraction(str(fraction)) * tokens)


def test_a_negative_capacity_at_evaluation_is_refused_by_its_name():
    with pytest.raises(ValueError, match="^eval_capacity_factor=-1 must be positive"):
        build_gate("switch", 4, 2, eval_capacity_factor=-1)


def test_dropped_tokens_send_no_gradient_to_the_router():
    gate = build_gate("switch", 4, 2, capacity_factor=0.5, jitter_eps=0)
    logits = torch.tensor([[1.0, 0]] * 4, requires_grad=True)
    gate.route(logits).combine_weight.sum().backward()
    assert (logits.grad.abs().sum(1) > 0).tolist() == [True, False, False, False]


@settings(max_examples=50)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 8),
    factor=st.floats(0.1, 10),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
)
def test_the_number_of_routed_pairs_is_within_max_routed(tokens, experts, factor, seed, share):
    torch.manual_seed(seed)
    padding = torch.rand(tokens) < share
    for name, options in (("switch", {}), ("expert_choice", {}), ("sparsemixer", {})):
        routing = build_gate(name, 4, experts, capacity_factor=factor, **options)(torch.randn(tokens, 4), padding)
        unrouted = routing.unrouted()
        assert int((~unrouted).sum()) <= routing.max_routed <= routing.expert_index.numel()
        assert routing.max_routed <= max(experts * math.ceil(factor * tokens / experts), 0)
