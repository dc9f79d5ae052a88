"""GShard (Lepikhin et al., 2020; arXiv 2006.16668, Algorithm 1), with the semantics of fairscale's Top2Gate.

The first expert is the arg-max of pi = softmax(logits); the second is sampled from the others in proportion to pi (at
inference: the second most probable). Choices beyond an expert's capacity are dropped, second choices before first ones,
and pi is renormalised over the remaining choices. The balance loss counts first choices only.
"""

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


def gshard_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor] = None,
    gumbel: Optional[Tensor] = None,
    balance_group: Any = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """Two experts per token for logits [S, E], E > 1; gumbel [S, E] samples the second one, None means inference.

    bias [E], if given, is used for the two choices only. No capacity is applied yet.
    """
    probabilities = logits.softmax(-1)  # [S, E]
    selection = biased(logits, bias)
    first = selection.argmax(-1, keepdim=True)  # [S, 1]
    others = (selection if gumbel is None else selection + gumbel).scatter(1, first, float("-inf"))
    expert_index = torch.cat([first, others.argmax(-1, keepdim=True)], 1)  # [S, 2]
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(normalise(probabilities.gather(1, expert_index)), padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, first, padding_mask, balance_group),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


def normalise(weight: Tensor) -> Tensor:
    """weight [S, k] divided by its row sums; rows of zeros stay zero."""
    return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps)


@register_gate("gshard")
class GShardGate(Gate):
    """GShard's gate. Its capacity factor is 1 by default, fairscale's C = 2 S / E; infinity makes it dropless.

    Raises ValueError for fewer than two experts.
    """

    top_k = 2

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        capacity_factor: Optional[float] = 1.0,
        bias_update_rate: float = 0.0,
        capacity_policy: str = "position",
        eval_capacity_factor: Optional[float] = None,
    ):
        super().__init__(
            model_dim,
            num_experts,
            capacity_factor,
            bias_update_rate,
            capacity_policy=capacity_policy,
            eval_capacity_factor=eval_capacity_factor,
        )
        if num_experts < 2:
            raise ValueError(f"router=gshard gives each token two experts; num_experts={num_experts} must be at least 2")

    def draw_noise(self, logits: Tensor) -> Optional[Tensor]:
        """The Gumbel noise [S, E] of one forward pass; None at inference."""
        return -torch.empty_like(logits).exponential_().log() if self.training else None

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See gshard_routing."""
        return gshard_routing(logits, padding_mask, self.draw_noise(logits), self.balance_group, self.selection_bias)

    def limit(self, routing: Routing) -> Routing:
        """See Gate.limit; the weights of the remaining choices are renormalised to sum to 1."""
        limited = super().limit(routing)
        return replace(limited, combine_weight=normalise(limited.combine_weight))
