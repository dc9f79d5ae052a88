"""The gradient of the router's weights: sums over parts of the tokens, which the caller adds in their order."""

import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import PART_COLUMNS, PART_EXPERTS, num_parts

STEP = 32


@triton.jit
def _kernel(grad, tokens, out, S, M, E, PART, STEP: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    part = tl.program_id(2)
    expert = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    stop = tl.minimum(part * PART + PART, S)
    total = tl.zeros([R, C], tl.float32)
    for first in range(part * PART, stop, STEP):
        token = first + tl.arange(0, STEP)
        left_at = grad + token[None, :].to(tl.int64) * E + expert[:, None]
        left = tl.load(left_at, mask=(expert < E)[:, None] & (token < stop)[None, :], other=0.0)
        right_at = tokens + token[:, None].to(tl.int64) * M + column[None, :]
        right = tl.load(right_at, mask=(token < stop)[:, None] & (column < M)[None, :], other=0.0)
        total = tl.dot(left, right.to(tl.float32), total, input_precision="tf32x3")
    target = out + (part.to(tl.int64) * E + expert[:, None]) * M + column[None, :]
    tl.store(target, total, mask=(expert < E)[:, None] & (column < M)[None, :])


def run(grad: Tensor, tokens: Tensor) -> Tensor:
    """See ops.project_backward_weight."""
    total, experts, width = grad.size(0), grad.size(1), tokens.size(1)
    parts = num_parts(total, experts, width)
    out = grad.new_empty(parts, experts, width)
    each = triton.cdiv(total, parts)
    rows = min(max(triton.next_power_of_2(experts), 16), PART_EXPERTS)
    grid = (triton.cdiv(experts, rows), triton.cdiv(width, PART_COLUMNS), parts)
    _kernel[grid](grad, tokens, out, total, width, experts, each, STEP, rows, PART_COLUMNS)
    return out
