"""The gradient of a bias: each expert's sum over its tiles, in their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tiles_of

STEP, COLUMNS = 16, 128


@triton.jit
def _kernel(sums, ends, out, N, M, E, TILE: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr):
    expert = tl.program_id(1)
    group = tl.arange(0, GROUPS)
    _, _, tiles, firsts = tiles_of(ends, N, E, TILE, GROUPS)
    first = tl.sum(tl.where(group == expert, firsts, 0), 0)
    last = first + tl.sum(tl.where(group == expert, tiles, 0), 0)
    column = tl.program_id(0) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for start in range(first, last, STEP):
        tile = start + tl.arange(0, STEP)
        mask = (tile < last)[:, None] & (column < M)[None, :]
        total += tl.sum(tl.load(sums + tile[:, None].to(tl.int64) * M + column[None, :], mask=mask, other=0.0), 0)
    tl.store(out + expert.to(tl.int64) * M + column, total.to(out.dtype.element_ty), mask=column < M)


def run(sums: Tensor, ends: Tensor, rows: int, tile: int, dtype: torch.dtype) -> Tensor:
    """See ops.sum_tiles."""
    experts, width = ends.size(0), sums.size(1)
    out = sums.new_empty(experts, width, dtype=dtype)
    grid = (triton.cdiv(width, COLUMNS), experts)
    _kernel[grid](sums, ends, out, rows, width, experts, tile, STEP, COLUMNS, padded_groups(experts))
    return out
