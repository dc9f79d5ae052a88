"""Expert choice (Zhou et al., 2022; arXiv 2202.09368): experts pick tokens.

Each expert takes the C tokens with the highest softmax(logits)_se, C = ceil(capacity_factor * tokens / E), and weighs them
by it. Load is balanced by construction, and a token may get several experts or none. The choice is among all tokens of
the batch, at inference too: a token's output depends on all others, including later ones, so an autoregressive decoder
would see its own future. Hence `Gate.causal` is False, and decoders refuse this gate unless told otherwise.

The Routing has one column per expert, sorted by the token's probabilities. `skipped` marks columns whose expert did not
pick the token: the index has S * E entries, but only C * E rows go through the experts.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.capacity import expert_capacity, most_routed, require_capacity_factor
from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding
from fairseq_sparsemixer.moe.gates.losses import router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


@torch.no_grad()
def picked_tokens(probabilities: Tensor, padding_mask: Optional[Tensor], capacity_factor: float) -> Tensor:
    """[S, E] bool: the tokens that each expert picks by probabilities [S, E]. Ties go to the earlier token."""
    num_tokens, num_experts = probabilities.shape
    scores = probabilities
    real = torch.full((), num_tokens, dtype=torch.int64, device=scores.device)
    if padding_mask is not None:
        scores = scores.masked_fill(padding_mask.unsqueeze(-1), -1)
        real = (~padding_mask).sum()
    capacity = torch.minimum(expert_capacity(real, num_experts, capacity_factor), real)
    order = scores.argsort(dim=0, descending=True, stable=True)  # [S, E], each expert's tokens, best first
    place = torch.arange(num_tokens, device=scores.device).unsqueeze(-1).expand_as(order)
    return torch.empty_like(order).scatter_(0, order, place) < capacity


def expert_choice_routing(logits: Tensor, padding_mask: Optional[Tensor], capacity_factor: float) -> Routing:
    """Each expert's choice among the tokens, for logits [S, E]."""
    num_tokens, num_experts = logits.shape
    probabilities = logits.softmax(-1)  # [S, E]
    expert_index = logits.detach().argsort(dim=-1, descending=True, stable=True)  # [S, E]
    picked = picked_tokens(probabilities, padding_mask, capacity_factor).gather(1, expert_index)  # [S, E], by column
    weight = probabilities.gather(1, expert_index).masked_fill(~picked, 0)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={"router_z": router_z_loss(logits, padding_mask)},
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
        skipped=~picked,
        max_routed=most_routed(num_tokens, num_experts, capacity_factor, num_columns=probabilities.numel()),
    )


@register_gate("expert_choice")
class ExpertChoiceGate(Gate):
    """The gate of expert choice. `capacity_factor`: the mean number of experts per token, at most num_experts."""

    causal = False

    def __init__(self, model_dim: int, num_experts: int, capacity_factor: float = 2.0):
        super().__init__(model_dim, num_experts)
        self.choices_per_token = min(require_capacity_factor(capacity_factor) or num_experts, num_experts)

    @property
    def experts_per_token(self) -> float:
        """See Gate: the capacity factor."""
        return self.choices_per_token

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See expert_choice_routing."""
        return expert_choice_routing(logits, padding_mask, self.choices_per_token)
