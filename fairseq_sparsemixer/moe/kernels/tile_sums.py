"""The sums of each tile of rows, for the gradient of an output bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import BIAS_TILE, num_tiles
from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tile_of

STEP, COLUMNS = 32, 128


@triton.jit
def _kernel(rows, ends, sums, N, M, E, TILE: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr):
    across = tl.cdiv(M, C)
    tile = tl.program_id(0) // across
    _, begin, _, end = tile_of(ends, tile, N, E, TILE, GROUPS)
    column = (tl.program_id(0) % across) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for first in range(begin, end, STEP):
        row = first + tl.arange(0, STEP)
        live = (row < end)[:, None] & (column < M)[None, :]
        total += tl.sum(tl.load(rows + row[:, None].to(tl.int64) * M + column[None, :], mask=live, other=0.0).to(tl.float32), 0)
    tl.store(sums + tile.to(tl.int64) * M + column, total, mask=column < M)


def run(rows: Tensor, ends: Tensor) -> Tensor:
    """See ops.tile_sums."""
    total, width, experts = rows.size(0), rows.size(1), ends.size(0)
    tiles = num_tiles(total, experts, BIAS_TILE)
    sums = rows.new_empty(tiles, width, dtype=torch.float32)
    grid = (triton.cdiv(width, COLUMNS) * tiles,)
    _kernel[grid](rows, ends, sums, total, width, experts, BIAS_TILE, STEP, COLUMNS, padded_groups(experts))
    return sums
