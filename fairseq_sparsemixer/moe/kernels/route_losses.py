"""The auxiliary losses from the sums of route.py, added in the order of the blocks."""

from typing import Tuple

import triton
import triton.language as tl
from torch import Tensor

STEP = 16  # blocks at once


@triton.jit
def _kernel(sums, balance, router_z, slopes, BLOCKS, E, K: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):
    expert = tl.arange(0, WIDTH)
    probability = tl.zeros([WIDTH], tl.float32)
    chosen = tl.zeros([WIDTH], tl.float32)
    square = 0.0
    real = 0.0
    for first in range(0, BLOCKS, STEP):
        block = first + tl.arange(0, STEP)
        row = sums + block * (2 * E + 2)
        mask = (block < BLOCKS)[:, None] & (expert < E)[None, :]
        probability += tl.sum(tl.load(row[:, None] + expert[None, :], mask=mask, other=0.0), 0)
        chosen += tl.sum(tl.load(row[:, None] + E + expert[None, :], mask=mask, other=0.0), 0)
        square += tl.sum(tl.load(row + 2 * E, mask=block < BLOCKS, other=0.0), 0)
        real += tl.sum(tl.load(row + 2 * E + 1, mask=block < BLOCKS, other=0.0), 0)
    count = tl.maximum(real, 1.0)
    slope = E * (chosen / count / K) / count
    tl.store(slopes + expert, slope, mask=expert < E)
    tl.store(slopes + E, 1 / count)
    tl.store(balance, tl.sum(slope * probability, 0))
    tl.store(router_z, square / count)


def run(sums: Tensor, k: int) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.route_losses."""
    blocks, experts = sums.size(0), sums.size(1) // 2 - 1
    balance, router_z, slopes = sums.new_empty(()), sums.new_empty(()), sums.new_empty(experts + 1)
    _kernel[(1,)](sums, balance, router_z, slopes, blocks, experts, k, STEP, triton.next_power_of_2(experts))
    return balance, router_z, slopes
