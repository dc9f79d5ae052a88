"""Auxiliary losses of gates. All are means over tokens, padding excluded, and zero without tokens.

A scope (balance_scope.py) says over which tokens; None: those of this forward.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope

FORWARD = BalanceScope()


def masked_sum(values: Tensor, padding_mask: Optional[Tensor], scope: Optional[BalanceScope] = None) -> Tensor:
    """Sum over the first dimension of values [S, ...], excluding padding_mask [S] (True = padding).

    [...], or [B, ...] where the scope is each of B sequences.
    """
    scope = scope or FORWARD
    return scope.total(_own_sum(values, padding_mask, scope))


def masked_mean(values: Tensor, padding_mask: Optional[Tensor], scope: Optional[BalanceScope] = None) -> Tensor:
    """As masked_sum, but the mean; zero without tokens. With other ranks in the scope, one differentiable collective."""
    scope = scope or FORWARD
    return _mean(_own_sum(values, padding_mask, scope), scope.own(real_tokens(values, padding_mask)), scope)


def real_tokens(values: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """[S]: 1 for tokens, 0 for padding, with the dtype and device of values [S, ...]."""
    return values.new_ones(len(values)) if padding_mask is None else (~padding_mask).to(values.dtype)


def over_sequences(losses: Tensor, real: Tensor, scope: Optional[BalanceScope]) -> Tensor:
    """A scalar loss as it is; of losses [B], the mean over the sequences that have tokens, by real_tokens [S]."""
    if scope is None or losses.dim() == 0:
        return losses
    has_tokens = (scope.own(real) > 0).to(losses.dtype)
    return (losses * has_tokens).sum() / has_tokens.sum().clamp(min=1)


def _own_sum(values: Tensor, padding_mask: Optional[Tensor], scope: BalanceScope) -> Tensor:
    if padding_mask is not None:
        values = values.masked_fill(padding_mask.view(-1, *[1] * (values.dim() - 1)), 0)
    return scope.own(values)


def _mean(total: Tensor, count: Tensor, scope: BalanceScope) -> Tensor:
    """This forward's sums, [...] or [B, ...], over their numbers of tokens, [] or [B], both over the scope."""
    count = count.reshape([*count.shape, *[1] * (total.dim() - count.dim())])
    if scope.spans_forwards:
        both = scope.total(torch.cat([total.reshape(-1), count.reshape(1)]))
        total, count = both[:-1].view(total.shape), both[-1]
    return total / count.clamp(min=1)


def balance_loss(
    probabilities: Tensor, expert_index: Tensor, padding_mask: Optional[Tensor] = None, scope: Optional[BalanceScope] = None
) -> Tensor:
    """Load-balancing loss E * sum_e f_e * P_e (Switch, arXiv 2101.03961, Eq. 4): 1 when balanced, E when collapsed.

    Args: probabilities [S, E], differentiable; expert_index [S, k]; padding_mask [S].
    f_e is the share of choices that went to expert e and P_e its mean probability, over the tokens of the scope. With a scope
    of sequences, this is the mean of their losses. Returns a scalar; 0 without tokens.
    """
    scope = scope or FORWARD
    num_experts = probabilities.size(-1)
    with torch.no_grad():
        real = real_tokens(probabilities, padding_mask)
        share = _mean(_own_choices(expert_index, real, num_experts, scope), scope.own(real), scope) / expert_index.size(1)
    losses = num_experts * (share * masked_mean(probabilities, padding_mask, scope)).sum(-1)
    return over_sequences(losses, real, scope)


def _own_choices(expert_index: Tensor, real: Tensor, num_experts: int, scope: BalanceScope) -> Tensor:
    """How many of the choices expert_index [S, k] of real tokens [S] went to each expert: [E], or [B, E] for B sequences."""
    segments, bins, shape = scope.segments(len(real), real.device), num_experts, [num_experts]
    if segments is not None:
        num_segments = scope.own(real).numel()
        expert_index = expert_index + num_experts * segments.unsqueeze(1)
        bins, shape = num_segments * num_experts, [num_segments, num_experts]
    each = real.unsqueeze(1).expand(expert_index.shape).reshape(-1)  # [S * k]
    return real.new_zeros(bins).scatter_add_(0, expert_index.reshape(-1), each).view(shape)  # exact below 2**24


def router_z_loss(logits: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, Eq. 5), which keeps logits [S, E] small. Returns a scalar."""
    return masked_mean(logits.logsumexp(-1).square(), padding_mask)


def cv_squared(values: Tensor) -> Tensor:
    """Squared coefficient of variation of values [..., E], variance / mean^2 (arXiv 1701.06538, Eq. 7): [...], 0 if equal."""
    return values.var(-1, unbiased=False) / values.mean(-1).square().clamp(min=1e-10)
