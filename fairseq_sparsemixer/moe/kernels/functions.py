"""Autograd functions made of the custom ops: sort, gather, the experts' feed-forward, combine, and the router's projection.

Backward passes are ops, too, in a fixed order of adding. Second derivatives are refused.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_sparsemixer.moe.kernels import choice, ops
from fairseq_sparsemixer.moe.kernels.sizes import BIAS_TILE, COMBINE_TILE


class Order(NamedTuple):
    """The pairs sorted by expert. pairs [P]: the pair in each row, unrouted ones last. place [P]: the row of each pair.

    ends [E] int32: the end of each expert's rows.
    """

    pairs: Tensor
    place: Tensor
    ends: Tensor


@torch.no_grad()
def sort(expert_index: Tensor, unrouted: Optional[Tensor], num_experts: int) -> Order:
    """The Order of expert_index [S, k] int64 without unrouted [S, k] bool; no host synchronisation."""
    expert_index = expert_index.contiguous()
    unrouted = None if unrouted is None else unrouted.contiguous()
    return Order(*ops.place_pairs(expert_index, unrouted, ops.count_pairs(expert_index, unrouted, num_experts)))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order, rows: int, k: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(order.place, order.ends)
        ctx.k, ctx.dtype = k, tokens.dtype
        gathered: Tensor = ops.gather_rows(tokens.contiguous(), order.pairs[:rows], order.ends, k, dtype)
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        place, ends = ctx.saved_tensors
        tokens = ops.combine_rows(grad.contiguous(), place, ends, ctx.k, None, None, None, None, ctx.dtype)
        return tokens, None, None, None, None


def gather(tokens: Tensor, order: Order, rows: int, k: int, dtype: torch.dtype) -> Tensor:
    """tokens [S, M] -> the first `rows` rows [N, M] in that order, cast to dtype; zero behind the last expert."""
    gathered: Tensor = _Gather.apply(tokens, order, rows, k, dtype)
    return gathered


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Optional[Tensor], scale: Optional[Tensor], expert_index: Tensor,
                order: Order) -> Tensor:  # fmt: skip
        k = weight.size(1)
        weight = weight.contiguous()
        ctx.save_for_backward(rows, weight, bias, scale, *order)
        ctx.k = k
        out: Tensor = ops.combine_rows(
            rows.contiguous(), order.place, order.ends, k, weight, bias, expert_index.contiguous(), scale, rows.dtype
        )
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, weight, bias, scale, pairs, _, ends = ctx.saved_tensors
        grad_rows, grad_weight, bias_sums, scale_sums = ops.combine_backward(
            grad.contiguous(), rows.contiguous(), pairs, ends, ctx.k, weight, bias, scale
        )
        grad_bias = None if bias is None else ops.sum_tiles(bias_sums, ends, pairs.size(0), COMBINE_TILE, bias.dtype)
        grad_scale = None if scale is None else ops.sum_parts(scale_sums, scale.dtype)
        return grad_rows, grad_weight.view(weight.shape).to(weight.dtype), grad_bias, grad_scale, None, None


def combine(
    rows: Tensor, weight: Tensor, bias: Optional[Tensor], scale: Optional[Tensor], expert_index: Tensor, order: Order
) -> Tensor:
    """rows [N, M] in that order -> [S, M]: each token's sum of weight [S, k] * (row + bias [E, M]), times scale [M]."""
    out: Tensor = _Combine.apply(rows, weight, bias, scale, expert_index, order)
    return out


class _FeedForward(torch.autograd.Function):
    """Products by torch or Triton; bias and activation in one op. Keeps the hidden layer for relu, the product for others."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Optional[Tensor],
                ends: Tensor, activation: str, dropout: float) -> Tensor:  # fmt: skip
        rows = rows.contiguous()
        keep, factor = None, 1 / (1 - dropout) if dropout < 1 else 0.0
        product = _product(rows, weight_in, ends)
        if dropout:
            keep = torch.empty(rows.size(0), weight_out.size(1), dtype=torch.bool, device=rows.device).bernoulli_(1 - dropout)
        hidden = ops.bias_activation(product, bias_in, ends, activation, keep, factor)
        out = _product(hidden, weight_out, ends)
        if bias_out is not None:
            out = ops.bias_activation(out, bias_out, ends, "identity", None, 1.0)
        relu = activation == "relu"
        ctx.save_for_backward(rows, weight_in, bias_in, weight_out, hidden if relu else product, None if relu else keep, ends)
        ctx.bias_out = None if bias_out is None else bias_out.dtype
        ctx.activation, ctx.factor = activation, factor
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, weight_in, bias_in, weight_out, kept, keep, ends = ctx.saved_tensors
        needs, grad, count = ctx.needs_input_grad, grad.contiguous(), rows.size(0)
        grad_rows = grad_in = grad_bias_in = grad_out = grad_bias_out = None
        if ctx.bias_out is not None and needs[4]:
            grad_bias_out = ops.sum_tiles(ops.tile_sums(grad, ends), ends, count, BIAS_TILE, ctx.bias_out)
        grad_hidden = _product(grad, weight_out.transpose(1, 2), ends)
        grad_inner, hidden, sums = ops.bias_activation_backward(
            grad_hidden, kept, bias_in, ends, ctx.activation, keep, ctx.factor
        )
        if needs[3]:
            grad_out = _weight_gradient(kept if ctx.activation == "relu" else hidden, grad, ends)
        if needs[2]:
            grad_bias_in = ops.sum_tiles(sums, ends, count, BIAS_TILE, bias_in.dtype)
        if needs[1]:
            grad_in = _weight_gradient(rows, grad_inner, ends)
        if needs[0]:
            grad_rows = _product(grad_inner, weight_in.transpose(1, 2), ends)
            if ctx.bias_out is not None:
                ops.clear_tail(grad_rows, ends)
        return grad_rows, grad_in, grad_bias_in, grad_out, grad_bias_out, None, None, None


def feed_forward(
    rows: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Optional[Tensor],
    ends: Tensor,
    activation: str,
    dropout: float = 0.0,
) -> Tensor:
    """rows [N, M] by expert, weights as in moe/feed_forward.py -> [N, M].

    With bias_out, rows behind the last expert give zeros and get a zero gradient. Without it, the output has no bias, and what is
    in these rows, and in their gradient, is undefined: gather and combine leave them out.
    """
    out: Tensor = _FeedForward.apply(rows, weight_in, bias_in, weight_out, bias_out, ends, activation, dropout)
    return out


def _product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    if rows.size(0) and choice.can_group(rows.device, rows.dtype, *matrices.shape[1:]):
        return F.grouped_mm(rows, matrices, offs=ends)
    product: Tensor = ops.grouped_product(rows, matrices, ends)
    return product


def _weight_gradient(inputs: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    if not (inputs.size(0) and choice.can_group(inputs.device, inputs.dtype, inputs.size(1), grad.size(1))):
        of_triton: Tensor = ops.grouped_weight_gradient(inputs, grad, ends)
        return of_triton
    gradient = F.grouped_mm(inputs.t(), grad, offs=ends)
    if choice.leaves_garbage(inputs.device):
        ops.clear_idle(gradient, ends)
    return gradient


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        ctx.save_for_backward(tokens, weight)
        ctx.set_materialize_grads(False)
        return ops.project(tokens.contiguous(), weight.contiguous()), tokens.view_as(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Optional[Tensor], others: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        tokens, weight = ctx.saved_tensors
        grad_tokens, grad_weight = others, None
        if grad is None:
            return grad_tokens, grad_weight
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            others = None if others is None else others.contiguous()
            grad_tokens = ops.project_backward_tokens(grad, weight.contiguous(), others, tokens.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = ops.sum_parts(ops.project_backward_weight(grad, tokens.contiguous()), weight.dtype)
        return grad_tokens, grad_weight


def project(tokens: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
    """tokens [S, M] up to float32, weight [E, M] -> logits [S, E] in float32, and the tokens.

    Of these, other uses can be made: the backward then adds up the gradients of all uses in one op.
    """
    result: Tuple[Tensor, Tensor] = _Project.apply(tokens, weight)
    return result


class RouterOptions(NamedTuple):
    """What does not depend on the tokens; see ops.route. gain: the estimator's."""

    router: str
    k: int
    jitter_eps: float = 0.0
    node: int = -1
    node_at_argmax: bool = False
    sampled: bool = True
    gain: float = 1.0


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, noise: Optional[Tensor], bias: Optional[Tensor], padding_mask: Optional[Tensor],
                options: RouterOptions) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        logits = logits.contiguous()
        noise, bias, padding_mask = (None if given is None else given.contiguous() for given in (noise, bias, padding_mask))
        index, weight, probabilities, sums = ops.route(logits, noise, bias, padding_mask, *options[:-1])
        balance, router_z, slopes = ops.route_losses(sums, options.k)
        ctx.save_for_backward(logits, noise, padding_mask, index, slopes)
        ctx.options = options
        ctx.mark_non_differentiable(index, probabilities)
        ctx.set_materialize_grads(False)
        return index, weight, probabilities, balance, router_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Any, grad_weight: Optional[Tensor], __: Any,
                 *grad_losses: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:  # fmt: skip
        logits, noise, padding_mask, index, slopes = ctx.saved_tensors
        options: RouterOptions = ctx.options
        grad_logits = ops.route_backward(
            None if grad_weight is None else grad_weight.contiguous(), *grad_losses, logits, noise, padding_mask, index,
            slopes, options.router, options.jitter_eps, options.gain,
        )  # fmt: skip
        return grad_logits, None, None, None, None


def route(
    logits: Tensor, noise: Optional[Tensor], bias: Optional[Tensor], padding_mask: Optional[Tensor], options: RouterOptions
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """expert_index [S, k], combine weights [S, k], probabilities [S, E], the balance loss and the router z-loss."""
    result: Tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _Route.apply(logits, noise, bias, padding_mask, options)
    return result
