"""SparseMixer-v2 (GRIN, Liu et al., 2024; arXiv 2409.12136): k sampled experts, with a third-order gradient.

The k experts are drawn one after another. Each draw is SparseMixer's, over the experts not drawn yet: the mask of unlikely
experts and the softmax are recomputed from the remaining logits.
"""

from typing import Any, List, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.estimators import Estimator, get_estimator
from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.fused import draw_uniform, fused_routing, is_fused, mixer_options
from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_jitter, require_top_k
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.sparsemixer import Draw, SamplingNoise, draw_expert, draw_sampling_noise, mask_unlikely


def sparsemixer_v2_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    top_k: int,
    jitter_eps: float,
    estimator: Estimator,
    noise: Optional[List[SamplingNoise]] = None,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """top_k distinct experts per token for logits [S, E]; noise has one SamplingNoise per draw, None means inference.

    At inference the draws are successive arg-maxes, and the multiplier of each is its masked probability. The balance
    loss and the statistics use the softmax of all logits, unmasked.
    """
    draws: List[Draw] = []
    remaining = logits
    for rank in range(top_k):
        draws.append(draw_expert(remaining, jitter_eps, estimator, noise[rank] if noise else None, bias))
        remaining = remaining.scatter(1, draws[-1].expert_index, float("-inf"))
    expert_index = torch.cat([draw.expert_index for draw in draws], 1)  # [S, k]
    probabilities = logits.softmax(-1)  # [S, E]
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(torch.cat([draw.weight for draw in draws], 1), padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, expert_index, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


@register_gate("sparsemixer_v2")
class SparseMixerV2Gate(Gate):
    """SparseMixer-v2's gate, for any top_k from 1 to num_experts (GRIN uses 2); no omega.

    `jitter_eps`, `gradient_estimator` and `estimator_at_argmax`: as in SparseMixerGate, for each draw.
    Raises ValueError for top_k or an option out of range.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        top_k: int = 2,
        jitter_eps: float = 0.1,
        gradient_estimator: str = "heun3",
        estimator_at_argmax: bool = False,
        **balancing: Any,
    ):
        super().__init__(model_dim, num_experts, **balancing)
        self.top_k = require_top_k(top_k, num_experts)
        self.jitter_eps = require_jitter(jitter_eps)
        self.estimator = get_estimator(gradient_estimator, first_order_argmax=not estimator_at_argmax)

    def draw_noise(self, logits: Tensor) -> Optional[List[SamplingNoise]]:
        """The noise of one forward pass over logits [S, E], fresh for each draw; None at inference."""
        return [draw_sampling_noise(logits) for _ in range(self.top_k)] if self.training else None

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the masked softmax of successive draws, without the estimator."""
        weights, remaining = [], logits
        for index in expert_index.split(1, 1):
            weights.append(mask_unlikely(remaining, self.jitter_eps, keep=index).softmax(-1).gather(1, index))
            remaining = remaining.scatter(1, index, float("-inf"))
        return torch.cat(weights, 1)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See sparsemixer_v2_routing."""
        if is_fused(logits, self.balance_scope):
            options = mixer_options("sparsemixer_v2", self.top_k, self.jitter_eps, self.estimator, self.training, sampled=True)
            noise = draw_uniform(logits, self.top_k) if self.training else None
            return fused_routing(logits, padding_mask, noise, self.selection_bias, options)
        return sparsemixer_v2_routing(
            logits,
            padding_mask,
            self.top_k,
            self.jitter_eps,
            self.estimator,
            self.draw_noise(logits),
            self.balance_scope,
            self.selection_bias,
        )
