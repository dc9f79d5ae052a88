"""Rows in blocks, and the order of the blocks transposed.

Rows from G ranks for L experts arrive in the order (rank, expert); experts take them in the order (expert, rank). Block sizes are
on the host, so one copy of G * L pieces does it, without an index.
"""

from typing import Any, List, Sequence, Tuple

import torch
from torch import Tensor

Sizes = Sequence[Sequence[int]]  # of blocks (i, j)


def transposed(sizes: Sizes) -> List[List[int]]:
    """The sizes of blocks (j, i)."""
    return [list(column) for column in zip(*sizes)]


def move_blocks(rows: Tensor, sizes: Sizes) -> Tensor:
    """rows [N, M] in blocks (i, j) -> [N, M] in blocks (j, i), in one copy; the rows themselves if they are in this order."""
    if len(sizes) == 1 or len(sizes[0]) == 1:
        return rows
    width = len(sizes[0])
    blocks = rows.split([size for line in sizes for size in line])
    return torch.cat([block for column in range(width) for block in blocks[column::width]])


class _TransposeBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: Sizes) -> Tensor:
        ctx.sizes = sizes
        return move_blocks(rows, sizes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return move_blocks(grad, transposed(ctx.sizes)), None


def transpose_blocks(rows: Tensor, sizes: Sizes) -> Tensor:
    """move_blocks with a gradient."""
    if len(sizes) == 1 or len(sizes[0]) == 1:
        return rows
    moved: Tensor = _TransposeBlocks.apply(rows, sizes)
    return moved
