"""Round robin: forced balance, for benchmarks. Nothing is learned.

Choice j of the i-th token that is not padding goes to expert (i * k + j) mod E, with weight 1 / k: loads differ by at most
one. The speed is that of a perfectly balanced router. A token's experts depend on its
place in the batch, so the gate is not causal.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_top_k
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


def round_robin_routing(logits: Tensor, padding_mask: Optional[Tensor], top_k: int) -> Routing:
    """Experts in turn for logits [S, E], of which only the shape is used."""
    num_tokens, num_experts = logits.shape
    if padding_mask is None:
        place = torch.arange(num_tokens, device=logits.device)
    else:
        place = (~padding_mask).cumsum(0) - 1  # -1 for padding in front, which mod E is still an expert
    turn = torch.arange(top_k, device=logits.device)
    expert_index = (place.unsqueeze(-1) * top_k + turn) % num_experts  # [S, k]
    weight = torch.full(expert_index.shape, 1 / top_k, dtype=logits.dtype, device=logits.device)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        probabilities=torch.zeros_like(logits).detach().scatter_(1, expert_index, 1 / top_k),
        padding_mask=padding_mask,
    )


@register_gate("round_robin")
class RoundRobinGate(Gate):
    """The gate of round robin. Its projection is random, frozen and saved, and computed so that its time is measured too.

    Raises ValueError for a bad top_k.
    """

    causal = False

    def __init__(self, model_dim: int, num_experts: int, top_k: int = 1, capacity_factor: Optional[float] = None):
        super().__init__(model_dim, num_experts, capacity_factor)
        self.top_k = require_top_k(top_k, num_experts)
        torch.nn.init.normal_(self.projection.weight)
        self.projection.weight.requires_grad_(False)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: always 1 / k."""
        return torch.full_like(expert_index, 1 / self.top_k, dtype=logits.dtype)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See round_robin_routing."""
        return round_robin_routing(logits, padding_mask, self.top_k)
