"""Auxiliary losses a gate can report. All are means over the tokens that are not padding; no token gives zero."""

from typing import Optional

import torch
from torch import Tensor


def masked_mean(values: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """Mean over the first dimension of values [S, ...], padding_mask [S] (True = padding) left out; zero when S is empty."""
    if padding_mask is None:
        return values.sum(0) / max(values.size(0), 1)
    mask = padding_mask.view(-1, *[1] * (values.dim() - 1))
    return values.masked_fill(mask, 0).sum(0) / (~padding_mask).sum().clamp(min=1)


def balance_loss(probabilities: Tensor, expert_index: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Load-balancing loss E * sum_e f_e * P_e (Switch, arXiv 2101.03961, Eq. 4): 1 when balanced, E when collapsed.

    Args: probabilities [S, E], differentiable; expert_index [S, k]; padding_mask [S].
    f_e is the share of choices given to expert e, P_e the mean probability of e. Returns a scalar; 0 without tokens.
    """
    num_experts = probabilities.size(-1)
    with torch.no_grad():
        weight = probabilities.new_full(expert_index.shape, 1 / expert_index.size(1))
        hits = torch.zeros_like(probabilities).scatter_add_(1, expert_index, weight)  # [S, E]
        share = masked_mean(hits, padding_mask)  # [E]
    return num_experts * (share * masked_mean(probabilities, padding_mask)).sum()


def router_z_loss(logits: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, Eq. 5), keeps logits [S, E] small. Returns a scalar."""
    return masked_mean(logits.logsumexp(-1).square(), padding_mask)
