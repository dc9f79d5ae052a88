"""The gradient of the tokens from that of the logits, plus that of their other uses, rounded once to the tokens' precision."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS, MOST_EXPERTS = 32, 128, 32


@triton.jit
def _kernel(grad, weight, others, out, S, M, E, HAS_OTHERS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
            STEP: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)
    for first in range(0, E, STEP):
        expert = first + tl.arange(0, STEP)
        left_at = grad + token[:, None].to(tl.int64) * E + expert[None, :]
        left = tl.load(left_at, mask=(token < S)[:, None] & (expert < E)[None, :], other=0.0)
        right_at = weight + expert[:, None] * M + column[None, :]
        right = tl.load(right_at, mask=(expert < E)[:, None] & (column < M)[None, :], other=0.0)
        total = tl.dot(left, right.to(tl.float32), total, input_precision="tf32x3")
    at = token[:, None].to(tl.int64) * M + column[None, :]
    mask = (token < S)[:, None] & (column < M)[None, :]
    if HAS_OTHERS:
        total += tl.load(others + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def run(grad: Tensor, weight: Tensor, others: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """See ops.project_backward_tokens."""
    total, experts, width = grad.size(0), grad.size(1), weight.size(1)
    out = grad.new_empty(total, width, dtype=dtype)
    step = min(max(triton.next_power_of_2(experts), 16), MOST_EXPERTS)
    if out.numel():
        grid = (triton.cdiv(total, TOKENS), triton.cdiv(width, COLUMNS))
        given = grad if others is None else others
        _kernel[grid](grad, weight, given, out, total, width, experts, others is not None, TOKENS, COLUMNS, step)
    return out
