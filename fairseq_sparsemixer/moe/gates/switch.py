"""Switch (Fedus, Zoph, Shazeer, 2021; arXiv 2101.03961): the arg-max expert, scaled by its probability."""

from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.fused import fused_routing, is_fused
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, require_jitter
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.kernels.functions import RouterOptions


def switch_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor] = None,
    jitter: Optional[Tensor] = None,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """Top-1 routing for logits [S, E]; jitter [S, E], if given, multiplies the logits (exploration in training).

    bias [E], if given, is added to the logits for the choice only.
    """
    if jitter is not None:
        logits = logits * jitter
    probabilities = logits.softmax(-1)  # [S, E]
    expert_index = biased(logits, bias).argmax(-1, keepdim=True)  # [S, 1]
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(probabilities.gather(1, expert_index), padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, expert_index, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


@register_gate("switch")
class SwitchGate(Gate):
    """Switch's gate. `jitter_eps` in [0, 1]: in training, the logits are multiplied by uniform noise in [1 - eps, 1 + eps].

    Raises ValueError for a jitter_eps out of range.
    """

    def __init__(self, model_dim: int, num_experts: int, jitter_eps: float = 0.1, **balancing: Any):
        super().__init__(model_dim, num_experts, **balancing)
        self.jitter_eps = require_jitter(jitter_eps, most=1)

    def draw_noise(self, logits: Tensor) -> Optional[Tensor]:
        """The jitter [S, E] of one forward pass; None at inference or if jitter_eps is 0."""
        if not self.training or self.jitter_eps == 0:
            return None
        return torch.empty_like(logits).uniform_(1 - self.jitter_eps, 1 + self.jitter_eps)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See switch_routing."""
        noise = self.draw_noise(logits)
        if is_fused(logits, self.balance_scope):
            return fused_routing(logits, padding_mask, noise, self.selection_bias, RouterOptions("switch", k=1))
        return switch_routing(logits, padding_mask, noise, self.balance_scope, self.selection_bias)
