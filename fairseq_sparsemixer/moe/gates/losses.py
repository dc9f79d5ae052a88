"""Auxiliary losses of gates. All are means over tokens, padding excluded, and zero without tokens."""

from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.parallel import SumOverRanks


def masked_sum(values: Tensor, padding_mask: Optional[Tensor], group: Any = None) -> Tensor:
    """Sum over the first dimension of values [S, ...], excluding padding_mask [S] (True = padding); see masked_mean."""
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.view(-1, *[1] * (values.dim() - 1)), 0)
    total = values.sum(0)
    return total if group is None else SumOverRanks.apply(total, group)


def masked_mean(values: Tensor, padding_mask: Optional[Tensor], group: Any = None) -> Tensor:
    """Mean over the first dimension of values [S, ...], excluding padding_mask [S] (True = padding); zero without tokens.

    With a process group, over the tokens of all its ranks: a differentiable collective.
    """
    return _mean(masked_sum(values, padding_mask), _real(values, padding_mask), group)


def _real(values: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """[S]: 1 for tokens, 0 for padding, with the dtype and device of values [S, ...]."""
    return values.new_ones(len(values)) if padding_mask is None else (~padding_mask).to(values.dtype)


def _mean(total: Tensor, real: Tensor, group: Any) -> Tensor:
    """A sum [...] over the tokens marked by `real` [S], divided by their number, both over the ranks of `group`."""
    count = real.sum()
    if group is not None:
        both = SumOverRanks.apply(torch.cat([total.reshape(-1), count.reshape(1)]), group)
        total, count = both[:-1].view(total.shape), both[-1]
    return total / count.clamp(min=1)


def balance_loss(probabilities: Tensor, expert_index: Tensor, padding_mask: Optional[Tensor] = None, group: Any = None) -> Tensor:
    """Load-balancing loss E * sum_e f_e * P_e (Switch, arXiv 2101.03961, Eq. 4): 1 when balanced, E when collapsed.

    Args: probabilities [S, E], differentiable; expert_index [S, k]; padding_mask [S].
    f_e is the share of choices that went to expert e and P_e its mean probability, over this batch, or over the batches
    of all ranks of a process group. Returns a scalar; 0 without tokens.
    """
    num_experts = probabilities.size(-1)
    with torch.no_grad():
        real = _real(probabilities, padding_mask)
        each = real.unsqueeze(1).expand(expert_index.shape).reshape(-1)  # [S * k]
        chosen = probabilities.new_zeros(num_experts).scatter_add_(0, expert_index.reshape(-1), each)  # [E], exact below 2**24
        share = _mean(chosen, real, group) / expert_index.size(1)
    return num_experts * (share * masked_mean(probabilities, padding_mask, group)).sum()


def router_z_loss(logits: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, Eq. 5), which keeps logits [S, E] small. Returns a scalar."""
    return masked_mean(logits.logsumexp(-1).square(), padding_mask)


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation of values [E], variance / mean^2 (arXiv 1701.06538, Eq. 7): a scalar, 0 if equal."""
    return values.var(unbiased=False) / values.mean().square().clamp(min=1e-10)
