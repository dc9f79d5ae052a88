"""Tiles: rows in order of their experts, cut into pieces of one expert each. A function for the kernels, not a kernel."""

import triton
import triton.language as tl


def padded_groups(num_experts: int) -> int:
    """The experts and the group of rows behind them, padded to a power of two."""
    return int(triton.next_power_of_2(num_experts + 1))


@triton.jit
def tiles_of(ends, rows, E, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """For each group, its first row, the row after its last, its number of tiles and its first tile. Group E: rows behind."""
    group = tl.arange(0, GROUPS)
    end = tl.load(ends + group, mask=group < E, other=0)
    end = tl.where(group < E, end, rows)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group <= E), other=0)
    start = tl.where(group <= E, start, rows)
    tiles = (tl.maximum(end - start, 0) + TILE - 1) // TILE
    return start, end, tiles, tl.cumsum(tiles, 0) - tiles


@triton.jit
def tile_of(ends, tile, rows, E, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """A tile's expert, its first row, the row after its last, and the row after its last that has an expert.

    No rows for a tile that is not needed. For rows behind the last expert: expert E - 1, so that its parameters can be read.
    """
    group = tl.arange(0, GROUPS)
    start, end, tiles, first = tiles_of(ends, rows, E, TILE, GROUPS)
    own = (first <= tile) & (tile < first + tiles)
    begin = tl.sum(tl.where(own, start + (tile - first) * TILE, 0), 0)
    stop = tl.minimum(begin + TILE, tl.sum(tl.where(own, end, 0), 0))
    owner = tl.sum(tl.where(own, group, 0), 0)
    return tl.minimum(owner, E - 1), begin, stop, tl.where(owner < E, stop, begin)
