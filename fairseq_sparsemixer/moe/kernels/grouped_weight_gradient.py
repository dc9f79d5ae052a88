"""The weight gradient of a grouped product: each expert's inputs transposed, times the gradients of its outputs.

Accumulated in float32 in the order of the rows; zero for experts without rows. Serves where grouped_product.py does.
"""

import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # of the matrix, both ways
BYTES = 128
STAGES, WARPS = 3, 8


@triton.jit
def _kernel(inputs, grad, ends, out, A, B, TILE: tl.constexpr, STEP: tl.constexpr):
    expert = tl.program_id(1)
    across = tl.cdiv(B, TILE)
    a = (tl.program_id(0) // across) * TILE + tl.arange(0, TILE)
    b = (tl.program_id(0) % across) * TILE + tl.arange(0, TILE)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(ends + expert)
    total = tl.zeros([TILE, TILE], tl.float32)
    for first in range(start, stop, STEP):
        row = first + tl.arange(0, STEP)
        left_at = inputs + row[None, :].to(tl.int64) * A + a[:, None]
        right_at = grad + row[:, None].to(tl.int64) * B + b[None, :]
        left = tl.load(left_at, mask=(a < A)[:, None] & (row < stop)[None, :], other=0.0)
        right = tl.load(right_at, mask=(row < stop)[:, None] & (b < B)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    target = out + expert.to(tl.int64) * A * B + a[:, None].to(tl.int64) * B + b[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(a < A)[:, None] & (b < B)[None, :])


def run(inputs: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """See ops.grouped_weight_gradient."""
    experts, a, b = ends.size(0), inputs.size(1), grad.size(1)
    out = inputs.new_empty(experts, a, b)
    grid = (triton.cdiv(a, TILE) * triton.cdiv(b, TILE), experts)
    _kernel[grid](inputs, grad, ends, out, a, b, TILE, BYTES // inputs.element_size(), num_stages=STAGES, num_warps=WARPS)
    return out
