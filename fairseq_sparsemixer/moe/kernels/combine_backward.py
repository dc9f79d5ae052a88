"""The backward of combine in one pass: gradients of rows and weights, and sums of tiles for those of bias and scale."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import COMBINE_TILE, num_tiles
from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tile_of

COLUMNS = 128


@triton.jit
def _kernel(grad, rows, pairs, ends, weight, bias, scale, grad_rows, grad_weight, bias_sums, scale_sums, P, N, M, E,
            K: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, TILE: tl.constexpr, C: tl.constexpr,
            GROUPS: tl.constexpr):  # fmt: skip
    tile = tl.program_id(0)
    expert, begin, stop, end = tile_of(ends, tile, P, E, TILE, GROUPS)
    row = begin + tl.arange(0, TILE)
    there = row < stop
    live = (row < end) & (row < N)
    pair = tl.load(pairs + row, mask=there, other=0)
    factor = tl.load(weight + pair, mask=live, other=0.0).to(tl.float32)
    products = tl.zeros([TILE], tl.float32)
    for first in range(0, M, C):
        column = first + tl.arange(0, C)
        inside = column < M
        mask = live[:, None] & inside[None, :]
        at = row[:, None].to(tl.int64) * M + column[None, :]
        upstream = tl.load(grad + (pair // K)[:, None] * M + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            own = tl.load(bias + expert.to(tl.int64) * M + column, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(mask, value + own[None, :], 0.0)
        product = upstream * value
        if HAS_SCALE:
            factors = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(scale_sums + tile.to(tl.int64) * M + column, tl.sum(product * factor[:, None], 0), mask=inside)
            product *= factors[None, :]
            upstream *= factors[None, :]
        products += tl.sum(product, 1)
        upstream *= factor[:, None]
        tl.store(grad_rows + at, upstream.to(grad_rows.dtype.element_ty), mask=(there & (row < N))[:, None] & inside[None, :])
        if HAS_BIAS:
            tl.store(bias_sums + tile.to(tl.int64) * M + column, tl.sum(upstream, 0), mask=inside)
    tl.store(grad_weight + pair, products, mask=there)


def run(
    grad: Tensor,
    rows: Tensor,
    pairs: Tensor,
    ends: Tensor,
    k: int,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.combine_backward."""
    num_pairs, width, experts = pairs.size(0), rows.size(1), ends.size(0)
    tiles = num_tiles(num_pairs, experts, COMBINE_TILE)
    grad_rows, grad_weight = torch.empty_like(rows), weight.new_empty(num_pairs, dtype=torch.float32)
    sums = [rows.new_empty(0 if tensor is None else tiles, width, dtype=torch.float32) for tensor in (bias, scale)]
    given = [weight if tensor is None else tensor for tensor in (bias, scale)]
    sizes = num_pairs, rows.size(0), width, experts, k
    _kernel[(tiles,)](
        grad, rows, pairs, ends, weight, *given, grad_rows, grad_weight, *sums, *sizes,
        bias is not None, scale is not None, COMBINE_TILE, COLUMNS, padded_groups(experts),
    )  # fmt: skip
    return grad_rows, grad_weight, sums[0], sums[1]
