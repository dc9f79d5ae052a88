"""DenseMixer (Yao et al., 2025; github.com/yaof20/DenseMixer): top-k forward, but every expert is computed in training.

The forward is an ordinary top-k layer: the sum of pi_e f_e over the k most probable experts, where pi is the softmax of
all logits, not renormalised over the k (as in DenseMixer for OLMoE and Qwen1.5-MoE). The backward treats the selection as
the identity (straight-through): every pi_e learns from f_e, chosen or not. Experts and tokens get the gradient of the
top-k layer. The cost is E experts per token in training and k at inference.

With `renormalise` (DenseMixer for Qwen3-MoE), the weights of the k sum to one: pi_e / n, n the sum of pi over the k. The
others count as pi_e / n with n constant in the backward. With k = 1 the weight is 1, and the router learns from the experts
that were not chosen.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, require_top_k, sum_to_one
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


def dense_st_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    top_k: int,
    every_expert: bool,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
    renormalise: bool = False,
) -> Routing:
    """The top_k experts for logits [S, E]; every_expert (training) appends the others with weight zero.

    With every_expert, the Routing has E columns sorted by probability, and the first top_k count as chosen. With
    renormalise, the weights of these sum to one.
    """
    probabilities = logits.softmax(-1)  # [S, E]
    order = biased(logits, bias).argsort(dim=-1, descending=True, stable=True)  # [S, E]
    expert_index = order if every_expert else order[:, :top_k]
    weight = probabilities.gather(1, expert_index)  # [S, E] or [S, k]
    chosen, others = weight[:, :top_k], weight[:, top_k:]
    if renormalise:
        total = chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)  # a selection bias may choose zeros
        chosen, others = chosen / total, others / total.detach()
    # straight-through weight of the experts not chosen: zero in forward, gradient one in backward
    weight = torch.cat([chosen, others - others.detach()], 1)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, order[:, :top_k], padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
        num_chosen=top_k,
    )


@register_gate("dense_st")
class DenseStraightThroughGate(Gate):
    """DenseMixer's gate: `top_k` experts forward, all experts in the router's gradient. Raises ValueError for a bad top_k.

    `renormalise`: the weights of the `top_k` sum to one.
    """

    def __init__(
        self, model_dim: int, num_experts: int, top_k: int = 1, bias_update_rate: float = 0.0, renormalise: bool = False
    ):
        super().__init__(model_dim, num_experts, bias_update_rate=bias_update_rate)
        self.top_k = require_top_k(top_k, num_experts)
        self.renormalise = renormalise

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: normalised with `renormalise`."""
        weight = super().weigh(logits, expert_index)
        if not self.renormalise:
            return weight
        weight = weight if skipped is None else weight.masked_fill(skipped, 0)
        return sum_to_one(weight)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See dense_st_routing."""
        return dense_st_routing(
            logits, padding_mask, self.top_k, self.training, self.balance_scope, self.selection_bias, self.renormalise
        )
