"""Combine: the weighted sum of the experts' outputs for each token, and of default outputs, if the gate has any."""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.dispatch.sorting import scatter_rows
from fairseq_sparsemixer.moe.gates.routing import Routing


def combine(rows: Tensor, routing: Routing, pairs: Tensor, num_tokens: int) -> Tensor:
    """rows [N, M], the experts' outputs for pairs [N] -> [S, M]: each token's sum of combine_weight * output_scale * row.

    Plus the default outputs of the experts that did not run.
    """
    weight = routing.combine_weight.reshape(-1).index_select(0, pairs)  # [N]
    output = scatter_rows(_Scale.apply(rows, weight, routing.output_scale), pairs, num_tokens, routing.expert_index.size(1))
    return output if routing.default is None else with_defaults(output, rows, routing, pairs)


def weigh_rows(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [N, M] times weight [N] -> [N, M]; the gradient of weight is summed in at least float32."""
    weighed: Tensor = _Scale.apply(rows, weight, None)
    return weighed


def with_defaults(output: Tensor, rows: Tensor, routing: Routing, pairs: Tensor) -> Tensor:
    """output [S, M] plus the default outputs; its backward reports the experts' outputs, rows [N, M], to their average."""
    weight, vectors, average = routing.default  # type: ignore[misc]  # the caller checked
    with torch.autocast(output.device.type, enabled=False):  # the router's gradient sums over M, as in _Scale
        output = output + (weight @ vectors.to(weight.dtype)).to(output.dtype)
        return output if average is None else average.watch(output, _sums_by_expert(rows, routing, pairs))


@torch.no_grad()
def _sums_by_expert(rows: Tensor, routing: Routing, pairs: Tensor) -> Tensor:
    """[E, M + 1]: the sum of each expert's rows [N, M], and their number."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    member = torch.zeros(routing.expert_index.numel(), routing.num_experts, dtype=dtype, device=rows.device)  # [S * k, E]
    member.scatter_(1, routing.expert_index.reshape(-1, 1), 1.0)
    unrouted = routing.unrouted()
    if unrouted is not None:
        member.masked_fill_(unrouted.reshape(-1, 1), 0)
    member = member.index_select(0, pairs)  # [N, E]
    return torch.cat([member.t() @ rows.to(dtype), member.sum(0).unsqueeze(1)], 1)  # a product, as it has one order of adding


class _Scale(torch.autograd.Function):
    """rows [N, M] times weight [N], and times scale [M] if given. One product serves both gradients in backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, scale: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(rows, weight, scale)
        return _scaled(rows, weight, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
        rows, weight, scale = ctx.saved_tensors
        # the router's gradient sums over M: half precision would lose digits and overflow long before the other gradients
        product = rows.to(torch.promote_types(rows.dtype, torch.float32)) * grad  # [N, M]
        if scale is None:
            grad_weight, grad_scale = product.sum(-1), None
        else:
            grad_weight = product @ scale.to(product.dtype)
            grad_scale = (weight.to(product.dtype) @ product).to(scale.dtype)
        return _scaled(grad, weight, scale), grad_weight.to(weight.dtype), grad_scale


def _scaled(rows: Tensor, weight: Tensor, scale: Optional[Tensor]) -> Tensor:
    out = rows * weight.unsqueeze(-1).to(rows.dtype)
    return out if scale is None else out.mul_(scale.to(rows.dtype))
