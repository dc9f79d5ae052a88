"""Hash layers: the expert is a fixed function of the token, and nothing is learned."""

import torch

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates.hash import hash_ids


def test_ids_are_hashed_by_knuths_multiplication_on_any_machine():
    ids = [0, 1, 2, 3, 17, 50257, 2**31 - 1]
    expected = [((i * 2654435761) % 2**32 // 2**12) * 8 // 2**20 for i in ids]
    assert hash_ids(torch.tensor(ids), 8).tolist() == expected


def test_consecutive_ids_spread_evenly():
    for num_experts in (2, 3, 8, 64):
        counts = torch.bincount(hash_ids(torch.arange(64000), num_experts), minlength=num_experts)
        assert counts.max().item() <= 1.01 * 64000 / num_experts


def test_a_tokens_expert_depends_only_on_its_id():
    layer = build_moe_layer("hash", 6, 8, 4)
    ids = torch.randint(1000, (2, 7))
    layer(torch.randn(2, 7, 6), token_ids=ids)
    first = layer.routing.expert_index
    layer(torch.randn(2, 7, 6), token_ids=ids)
    assert torch.equal(layer.routing.expert_index, first)
    assert torch.equal(first.flatten(), hash_ids(ids.flatten(), 4))
    assert layer.routing.combine_weight.unique().tolist() == [1]


def test_without_ids_the_hash_is_a_fixed_random_projection():
    gate = build_gate("hash", 6, 4)
    tokens = torch.randn(30, 6)
    expert_index = gate(tokens).expert_index
    assert torch.equal(expert_index, gate(3 * tokens).expert_index)  # locality-sensitive: only the direction matters
    assert expert_index.squeeze(1).tolist() == (tokens @ gate.projection.weight.t()).argmax(-1).tolist()


def test_nothing_is_learned_and_the_projection_is_saved():
    gate = build_gate("hash", 6, 4)
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert gate(torch.randn(5, 6)).aux_losses == {}
    assert "projection.weight" in gate.state_dict()
