"""Stacked feed-forward networks computed in a loop over the experts that have rows, with counts on the host.

Runs on any device; grouped.py does the same in one kernel for all experts where available. N rows, E experts, model
dimension M, hidden dimension H; I is H, or 2H for gated activations.
"""

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_sparsemixer.moe.gradient_memory import GradBufferPool
from fairseq_sparsemixer.moe.onednn import linear, takes_onednn

Activation = Callable[[Tensor], Tensor]


class Weights(NamedTuple):
    """weight_in [E, M, I], bias_in [E, I], weight_out [E, H, M], bias_out [E, M]."""

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor

    def to(self, dtype: torch.dtype) -> "Weights":
        """All four cast to another dtype, differentiably."""
        return Weights(*(tensor.to(dtype) for tensor in self))


class Group(NamedTuple):
    """The first `count` of `rows` belong to this expert; the rest belong to later experts and only round up the size."""

    expert: int
    count: int  # type: ignore[assignment]  # nobody counts the entries of this tuple
    rows: slice


def groups_of(counts: Sequence[int], rounded: bool = False) -> List[Group]:
    """A Group for each expert that has rows, in order. Results for rows beyond a group's own must be overwritten."""
    groups, start, total = [], 0, sum(counts)
    for expert, count in enumerate(counts):
        if count:
            size = _round_up(count) if rounded else count
            groups.append(Group(expert, count, slice(start, min(start + size, total))))
        start += count
    return groups


def _round_up(count: int) -> int:
    """Round up to one of sixteen sizes per power of two; counts below 32 stay as they are.

    oneDNN prepares a kernel for each new number of rows, which takes longer than a small product (benchmarks/NOTES.md).
    """
    step = 1 << max(count.bit_length() - 5, 0)
    return -(-count // step) * step


def feed_forward_by_expert(
    rows: Tensor,
    weights: Weights,
    counts: Sequence[int],
    activation: Activation,
    dropout: float = 0.0,
    memory: Optional[GradBufferPool] = None,
) -> Tensor:
    """rows [N, M] grouped by expert, counts [E] summing to N -> [N, M].

    activation maps [n, I] to [n, H] row by row and has no parameters; dropout in [0, 1] acts on its result. Weight
    gradients are allocated from `memory` if given.
    """
    if torch.is_grad_enabled():
        out: Tensor = _ByExpert.apply(rows, *weights, counts, activation, dropout, memory or GradBufferPool())
        return out
    return _run_by_expert(rows, weights, groups_of(counts, rounded=takes_onednn(rows)), activation, dropout, keep=None)


class _ByExpert(torch.autograd.Function):
    """Runs each expert to the end before the next, so that its hidden layer is still in the cache when it is read.

    Activations other than relu are recomputed in backward. Gradients are written directly into one buffer for all
    experts; only the slices of idle experts are zero-filled.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor,
                counts: Sequence[int], activation: Activation, dropout: float, memory: GradBufferPool) -> Tensor:  # fmt: skip
        weights = Weights(weight_in, bias_in, weight_out, bias_out)
        keep: List[Tuple[Tensor, ...]] = []
        groups = groups_of(counts, rounded=takes_onednn(rows))
        out = _run_by_expert(rows, weights, groups, activation, dropout, keep)
        ctx.save_for_backward(rows, weight_in, weight_out, *(tensor for hidden in keep for tensor in hidden))
        ctx.counts, ctx.groups, ctx.activation, ctx.dropout, ctx.memory = counts, groups, activation, dropout, memory
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, weight_in, weight_out, *saved = ctx.saved_tensors
        groups: List[Group] = ctx.groups
        grad = grad.contiguous()
        needs_rows, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:])
        grad_rows: Any = torch.empty_like(rows) if needs_rows else None
        grad_in = grad_bias_in = grad_out = grad_bias_out = None  # type: Any
        if needs_weights:
            grad_in, grad_out = ctx.memory.like("in", weight_in), ctx.memory.like("out", weight_out)
            grad_bias_in, grad_bias_out = grad_in.new_empty(grad_in.shape[::2]), grad_out.new_empty(grad_out.shape[::2])
            for expert in (expert for expert, count in enumerate(ctx.counts) if count == 0):
                for idle in (grad_in, grad_bias_in, grad_out, grad_bias_out):
                    idle[expert].zero_()
        width = len(saved) // max(len(groups), 1)
        for index, (expert, count, where) in enumerate(groups):
            kept = saved[index * width : (index + 1) * width]
            grad_hidden = linear(grad[where], weight_out[expert])
            hidden, grad_inner = activation_backward(kept, grad_hidden, ctx.activation, ctx.dropout)
            if needs_weights:
                own, incoming, own_grad = rows[where][:count], grad[where][:count], grad_inner[:count]
                torch.mm(hidden[:count].t(), incoming, out=grad_out[expert])
                torch.sum(incoming, 0, out=grad_bias_out[expert])
                torch.mm(own.t(), own_grad, out=grad_in[expert])
                torch.sum(own_grad, 0, out=grad_bias_in[expert])
            if needs_rows:
                grad_rows[where] = linear(grad_inner, weight_in[expert])
        return grad_rows, grad_in, grad_bias_in, grad_out, grad_bias_out, None, None, None, None


def _run_by_expert(
    rows: Tensor,
    weights: Weights,
    groups: Sequence[Group],
    activation: Activation,
    dropout: float,
    keep: Optional[List[Tuple[Tensor, ...]]],
) -> Tensor:
    """The forward pass; appends what each group's backward needs to `keep`, if given."""
    out = rows.new_empty(rows.size(0), weights.weight_out.size(2))
    for expert, _, where in groups:
        inner = linear(rows[where], weights.weight_in[expert].t(), weights.bias_in[expert])
        hidden, kept = activation_forward(inner, activation, dropout)
        if keep is not None:
            keep.append(kept)
        out[where] = linear(hidden, weights.weight_out[expert].t(), weights.bias_out[expert])
    return out


def activation_forward(inner: Tensor, activation: Activation, dropout: float) -> Tuple[Tensor, Tuple[Tensor, ...]]:
    """inner [n, I] (overwritten for relu) -> hidden [n, H], and what activation_backward needs.

    relu needs only the result, which is zero where the unit was off or dropped.
    """
    if activation is F.relu:
        hidden = inner.relu_()
        hidden = torch.dropout_(hidden, dropout, True) if dropout else hidden
        return hidden, (hidden,)
    hidden = activation(inner)
    if not dropout:
        return hidden, (inner,)
    keep = torch.empty_like(hidden, dtype=torch.bool).bernoulli_(1 - dropout)
    return _drop(hidden, keep, dropout), (inner, keep)


def activation_backward(
    kept: Sequence[Tensor], grad_hidden: Tensor, activation: Activation, dropout: float
) -> Tuple[Tensor, Tensor]:
    """hidden [n, H], recomputed, and the gradient of inner [n, I]."""
    if activation is F.relu:
        (hidden,) = kept
        grad_inner = torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
        return hidden, grad_inner.mul_(_scale(dropout)) if dropout else grad_inner
    inner = kept[0].detach().requires_grad_()
    with torch.enable_grad():
        hidden = activation(inner)
        if dropout:
            hidden = _drop(hidden, kept[1], dropout)
        (grad_inner,) = torch.autograd.grad(hidden, inner, grad_hidden)
    return hidden.detach(), grad_inner


def _drop(hidden: Tensor, keep: Tensor, dropout: float) -> Tensor:
    return hidden * keep * _scale(dropout)


def _scale(dropout: float) -> float:
    return 1 / (1 - dropout) if dropout < 1 else 0.0
