"""Hash layers (Roller et al., 2021; arXiv 2106.04426): the expert is a fixed random function of the token. Nothing is learned.

If the model passes vocabulary ids to its layers, as ours do, the id is hashed, as in the paper (its "random hash", the
same in every layer). A standalone layer sees only vectors and hashes those: the arg-max of a fixed random projection, a
locality-sensitive hash (cross-polytope, Andoni et al., 2015; arXiv 1509.02897). Unlike the paper's, it gives similar
vectors the same expert, and a token's expert drifts as the layers below learn.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing

KNUTH = 2654435761  # about 2^32 / golden ratio: Knuth's multiplicative hash, of which the upper bits are used


def hash_ids(token_ids: Tensor, num_experts: int) -> Tensor:
    """token_ids [S] int64, non-negative -> experts [S] int64, the same on every machine."""
    upper = ((token_ids * KNUTH) & 0xFFFFFFFF) >> 12  # 20 bits
    return upper * num_experts >> 20


def hash_routing(expert: Tensor, num_experts: int, padding_mask: Optional[Tensor] = None) -> Routing:
    """Route every token to its expert [S], with weight 1."""
    expert_index = expert.unsqueeze(1)  # [S, 1]
    probabilities = F.one_hot(expert, num_experts).to(torch.float32)  # [S, E]
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(torch.ones_like(probabilities[:, :1]), padding_mask),
        probabilities=probabilities,
        padding_mask=padding_mask,
    )


@register_gate("hash")
class HashGate(Gate):
    """The gate of hash layers. Its projection is random, frozen and saved; it is used if token ids are unknown."""

    wants_token_ids = True

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        capacity_factor: Optional[float] = None,
        eval_capacity_factor: Optional[float] = None,
    ):
        super().__init__(model_dim, num_experts, capacity_factor, eval_capacity_factor=eval_capacity_factor)
        torch.nn.init.normal_(self.projection.weight)
        self.projection.weight.requires_grad_(False)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: always 1."""
        return torch.ones_like(expert_index, dtype=logits.dtype)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See hash_routing: the arg-max of logits [S, E]."""
        return hash_routing(logits.argmax(-1), self.num_experts, padding_mask)

    def forward(self, tokens: Tensor, padding_mask: Optional[Tensor] = None, token_ids: Optional[Tensor] = None) -> Routing:
        """See Gate.forward."""
        if token_ids is None:
            return super().forward(tokens, padding_mask)
        experts = hash_ids(token_ids, self.num_experts)
        return self.route(F.one_hot(experts, self.num_experts).to(torch.float32), padding_mask)
