"""The statistics of a Routing, compared with plain Python loops over tokens."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.moe.gates import Routing


def random_routing(tokens, experts, k, seed, padding=True, dropping=True):
    generator = torch.Generator().manual_seed(seed)
    return Routing(
        expert_index=torch.randint(experts, (tokens, k), generator=generator),
        combine_weight=torch.rand(tokens, k, generator=generator),
        probabilities=torch.randn(tokens, experts, generator=generator).softmax(-1),
        padding_mask=torch.rand(tokens, generator=generator) < 0.3 if padding else None,
        dropped=torch.rand(tokens, k, generator=generator) < 0.3 if dropping else None,
    )


def statistics_by_loops(routing):
    tokens, k = routing.expert_index.shape
    experts = routing.probabilities.size(1)
    load = [[0] * experts for _ in range(k)]
    chosen = [[0] * experts for _ in range(k)]
    dropped = [0] * k
    real, entropy, argmax = 0, 0.0, 0
    for s in range(tokens):
        if routing.padding_mask is not None and routing.padding_mask[s]:
            continue
        real += 1
        pi = routing.probabilities[s].tolist()
        entropy -= sum(p * math.log(p) for p in pi)
        argmax += pi[routing.expert_index[s, 0]] == max(pi)
        for j in range(k):
            chosen[j][routing.expert_index[s, j]] += 1
            if routing.dropped is not None and routing.dropped[s, j]:
                dropped[j] += 1
            else:
                load[j][routing.expert_index[s, j]] += 1
    return {"tokens": real, "load": load, "chosen": chosen, "entropy": entropy, "argmax": argmax, "dropped": dropped}


sizes = dict(tokens=st.integers(0, 9), experts=st.integers(1, 5), k=st.integers(1, 3), seed=st.integers(0, 99))


@settings(max_examples=40)
@given(**sizes, padding=st.booleans(), dropping=st.booleans())
def test_statistics_are_sums_over_non_padding_tokens(tokens, experts, k, seed, padding, dropping):
    routing = random_routing(tokens, experts, k, seed, padding, dropping)
    found = {name: value.tolist() for name, value in routing.statistics().items()}
    expected = statistics_by_loops(routing)
    assert found.pop("entropy") == pytest.approx(expected.pop("entropy"), rel=1e-5, abs=1e-6)
    assert found == expected


@settings(max_examples=20)
@given(**sizes)
def test_statistics_of_parts_sum_to_those_of_the_whole(tokens, experts, k, seed):
    whole = random_routing(tokens, experts, k, seed)
    half = tokens // 2
    fields = ("expert_index", "combine_weight", "probabilities", "padding_mask", "dropped")
    parts = [Routing(**{name: getattr(whole, name)[rows] for name in fields}) for rows in (slice(0, half), slice(half, None))]
    sums = [part.statistics() for part in parts]
    for name, value in whole.statistics().items():
        torch.testing.assert_close(sums[0][name] + sums[1][name], value)


def test_a_deterministic_gate_has_zero_entropy():
    routing = Routing(torch.tensor([[1]]), torch.ones(1, 1), probabilities=torch.tensor([[0.0, 1.0, 0.0]]))
    assert routing.statistics()["entropy"].item() == 0


def test_columns_beyond_the_choices_are_not_counted():
    routing = replace(random_routing(6, 4, 3, seed=0, padding=False, dropping=False), num_chosen=1)
    assert routing.statistics()["load"].shape == (1, 4)
    assert routing.statistics()["load"].sum() == 6


@settings(max_examples=20)
@given(**sizes, padding=st.booleans(), dropping=st.booleans())
def test_unrouted_pairs_are_padding_and_dropped_pairs(tokens, experts, k, seed, padding, dropping):
    routing = random_routing(tokens, experts, k, seed, padding, dropping)
    expected = torch.zeros(tokens, k, dtype=torch.bool)
    if padding:
        expected |= routing.padding_mask.unsqueeze(1)
    if dropping:
        expected |= routing.dropped
    found = routing.unrouted()
    assert torch.equal(expected, expected.new_zeros(tokens, k) if found is None else found)
    assert (found is None) == (not padding and not dropping)
