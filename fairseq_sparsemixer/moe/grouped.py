"""Stacked feed-forward networks computed in one kernel for all experts, with counts on the device.

For bfloat16 on GPUs with torch's grouped matrix product, where the fused kernels (kernels/) do not run: without Triton, and for
activations that they do not know. Names and shapes as in feed_forward.py.
"""

from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_sparsemixer.moe.feed_forward import Activation, Weights, activation_backward, activation_forward
from fairseq_sparsemixer.moe.kernels.choice import leaves_garbage

ONES = 8  # columns: the grouped product needs rows of 16 bytes


def feed_forward_grouped(rows: Tensor, weights: Weights, counts: Tensor, activation: Activation, dropout: float = 0.0) -> Tensor:
    """As feed_forward_by_expert, without a host synchronisation: counts [E] int64 on the device may sum to less than N.

    Rows after the last expert's give zeros and get a zero gradient.
    """
    out: Tensor = _Grouped.apply(rows, *weights, counts, activation, dropout)
    return out


class _Grouped(torch.autograd.Function):
    """Manual backward: bias gradients are grouped products with ones, in a fixed order and without a float32 copy.

    The product leaves rows after the last group uninitialised: they are zeroed in everything that is returned.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor,
                counts: Tensor, activation: Activation, dropout: float) -> Tensor:  # fmt: skip
        ends = counts.cumsum(0)
        place = torch.arange(rows.size(0), device=rows.device)
        expert = torch.searchsorted(ends, place, right=True)  # [N], E after the last group
        behind = (expert == counts.size(0)).unsqueeze(1)
        expert, ends = expert.clamp_(max=counts.size(0) - 1), ends.to(torch.int32)
        inner = F.grouped_mm(rows, weight_in, offs=ends).add_(bias_in.index_select(0, expert))
        hidden, kept = activation_forward(inner, activation, dropout)
        out = F.grouped_mm(hidden, weight_out, offs=ends).add_(bias_out.index_select(0, expert))
        ctx.save_for_backward(rows, weight_in, weight_out, counts, ends, behind, *kept)
        ctx.activation, ctx.dropout = activation, dropout
        return out.masked_fill_(behind, 0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        rows, weight_in, weight_out, counts, ends, behind, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = F.grouped_mm(grad, weight_out.transpose(1, 2), offs=ends)
        hidden, grad_inner = activation_backward(kept, grad_hidden, ctx.activation, ctx.dropout)
        grad_out, grad_bias_out = _weight_gradients(hidden, grad, counts, ends)
        grad_in, grad_bias_in = _weight_gradients(rows, grad_inner, counts, ends)
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = F.grouped_mm(grad_inner, weight_in.transpose(1, 2), offs=ends).masked_fill_(behind, 0)
        return grad_rows, grad_in, grad_bias_in, grad_out, grad_bias_out, None, None, None


def _weight_gradients(inputs: Tensor, grad: Tensor, counts: Tensor, ends: Tensor) -> Tuple[Tensor, Tensor]:
    """inputs [N, A], grad [N, B] of the outputs -> the gradients of weight [E, A, B] and bias [E, B]."""
    weight = F.grouped_mm(inputs.t(), grad, offs=ends)
    bias = F.grouped_mm(grad.new_ones(grad.size(0), ONES).t(), grad, offs=ends)[:, 0]
    if leaves_garbage(grad.device):
        without_rows = counts == 0
        weight.masked_fill_(without_rows.view(-1, 1, 1), 0)
        bias = bias.masked_fill(without_rows.unsqueeze(1), 0)
    return weight, bias
