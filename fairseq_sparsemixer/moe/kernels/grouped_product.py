"""A grouped product: each expert's rows times its matrix, accumulated in float32; zeros behind the last expert's rows.

Serves where torch's grouped product has no kernel: float16, compute capability 8, and older versions of torch.
"""

import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import num_tiles
from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tile_of

TILE, COLUMNS = 128, 128
BYTES = 128  # of a row that a step multiplies
STAGES, WARPS = 3, 8  # 96 KiB of shared memory: also fits compute capability 8.6


@triton.jit
def _kernel(rows, matrices, ends, out, N, A, B, E, stride_e, stride_a, stride_b, TILE: tl.constexpr, C: tl.constexpr,
            STEP: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    across = tl.cdiv(B, C)
    expert, begin, stop, end = tile_of(ends, tl.program_id(0) // across, N, E, TILE, GROUPS)
    row = begin + tl.arange(0, TILE)
    column = (tl.program_id(0) % across) * C + tl.arange(0, C)
    there, inside = row < end, column < B
    source = rows + row[:, None].to(tl.int64) * A
    matrix = matrices + expert.to(tl.int64) * stride_e + column[None, :].to(tl.int64) * stride_b
    total = tl.zeros([TILE, C], tl.float32)
    if begin < end:
        for first in range(0, A, STEP):
            inner = first + tl.arange(0, STEP)
            left = tl.load(source + inner[None, :], mask=there[:, None] & (inner < A)[None, :], other=0.0)
            right = tl.load(matrix + inner[:, None] * stride_a, mask=(inner < A)[:, None] & inside[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
    target = out + row[:, None].to(tl.int64) * B + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row < stop)[:, None] & inside[None, :])


def run(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """See ops.grouped_product."""
    total, inner, columns, experts = rows.size(0), rows.size(1), matrices.size(2), ends.size(0)
    out = rows.new_empty(total, columns)
    step = BYTES // rows.element_size()
    grid = (triton.cdiv(columns, COLUMNS) * num_tiles(total, experts, TILE),)
    _kernel[grid](
        rows, matrices, ends, out, total, inner, columns, experts, *matrices.stride(), TILE, COLUMNS, step,
        padded_groups(experts), num_stages=STAGES, num_warps=WARPS,
    )  # fmt: skip
    return out
