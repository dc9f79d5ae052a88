"""Choices read from a routing, and replaced in one, token by token."""

import torch

from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.tracing import Routes, follow_routes, read_choices

T, B = 3, 2
IDS = torch.arange(T * B).view(T, B) + 10  # [T, B]


def routing(**values):
    """Token s has experts s mod 4 and (s + 1) mod 4, with weights s and s / 2; the first sentence begins with padding."""
    token = torch.arange(T * B)
    padding = torch.tensor([[True, False], [False, False], [False, False]])
    index = torch.stack([token % 4, (token + 1) % 4], 1)
    weight = torch.stack([token, token / 2], 1).masked_fill(padding.view(-1, 1), 0)
    return Routing(index, weight, {}, torch.full((T * B, 4), 0.25), padding.view(-1), **values)


def test_choices_are_in_order_of_sentences_and_positions_without_padding():
    choices = read_choices(routing(), (T, B), IDS)
    assert choices.column.tolist() == [0, 0, 1, 1, 1]
    assert choices.position.tolist() == [0, 1, 0, 1, 2]
    assert choices.token_id.tolist() == [12, 14, 11, 13, 15]
    assert choices.expert_index.tolist() == [[2, 3], [0, 1], [1, 2], [3, 0], [1, 2]]
    assert choices.weight[:, 0].tolist() == [2, 4, 1, 3, 5]
    assert choices.ran.all()


def test_dropped_choices_and_columns_for_the_gradient_did_not_run():
    dropped = torch.zeros(T * B, 2, dtype=torch.bool)
    dropped[2, 1] = True
    assert read_choices(routing(dropped=dropped), (T, B)).ran.tolist() == [[True, False], *[[True, True]] * 4]
    assert read_choices(routing(num_chosen=1), (T, B)).expert_index.tolist() == [[2], [0], [1], [3], [1]]


def test_unknown_tokens_keep_their_routing_and_the_others_follow():
    """Also where they have different numbers of experts, and where the gate drops."""
    dropped = torch.zeros(T * B, 2, dtype=torch.bool)
    dropped[1, 1] = True
    own = routing(dropped=dropped)
    known = torch.tensor([False, False, True, True, True, True])
    index = torch.full((T * B, 3), 3)
    skipped = torch.tensor([False, False, True]).expand(T * B, 3)
    found = follow_routes(own, Routes(index, torch.full((T * B, 3), 0.5), skipped, known), None)
    ran = ~found.unrouted()
    assert [found.expert_index[s, ran[s]].tolist() for s in range(T * B)] == [[], [1], [3, 3], [3, 3], [3, 3], [3, 3]]
    assert [found.combine_weight[s, ran[s]].tolist() for s in range(T * B)] == [[], [1], *[[0.5, 0.5]] * 4]
    assert found.dropped is None


def test_weights_without_a_trace_of_them_are_the_gates():
    index = torch.full((T * B, 1), 2)
    found = follow_routes(routing(), Routes(index, None), lambda experts, skipped: experts * 0.25)
    assert found.combine_weight[:, 0].tolist() == [0, 0.5, 0.5, 0.5, 0.5, 0.5]  # padding keeps weight zero
