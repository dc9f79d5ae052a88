"""The backward of bias and activation in one pass, with the sums of each tile for the gradient of the bias."""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.activations import GATED, curve, kind_of, slope
from fairseq_sparsemixer.moe.kernels.sizes import BIAS_TILE, num_tiles
from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tile_of

STEP, COLUMNS = 16, 128


@triton.jit
def _kernel(grad, kept, bias, ends, keep, grad_inner, hidden, sums, N, H, E, factor, KIND: tl.constexpr, GATED: tl.constexpr,
            DROPS: tl.constexpr, RECOMPUTES: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr,
            GROUPS: tl.constexpr):  # fmt: skip
    across = tl.cdiv(H, C)
    tile = tl.program_id(0) // across
    expert, begin, stop, end = tile_of(ends, tile, N, E, TILE, GROUPS)
    column = (tl.program_id(0) % across) * C + tl.arange(0, C)
    width = 2 * H if GATED else H
    mask = column < H
    own = expert.to(tl.int64) * width + column
    total = tl.zeros([C], tl.float32)
    total_linear = tl.zeros([C], tl.float32)
    if RECOMPUTES:
        shift = tl.load(bias + own, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            shift_linear = tl.load(bias + own + H, mask=mask, other=0.0).to(tl.float32)
    for first in range(begin, stop, STEP):
        row = first + tl.arange(0, STEP)
        inside = (row < stop)[:, None] & (column < H)[None, :]
        live = (row < end)[:, None] & (column < H)[None, :]
        at = row[:, None].to(tl.int64) * width + column[None, :]
        target = row[:, None].to(tl.int64) * H + column[None, :]
        upstream = tl.load(grad + target, mask=live, other=0.0).to(tl.float32)
        value = tl.load(kept + at, mask=live, other=0.0).to(tl.float32)
        if RECOMPUTES:
            value += shift[None, :]
            if DROPS:
                scale = tl.where(tl.load(keep + target, mask=live, other=0) != 0, factor, 0.0)
                upstream *= scale
            result = curve(value, KIND)
            if GATED:
                linear = tl.load(kept + at + H, mask=live, other=0.0).to(tl.float32) + shift_linear[None, :]
                of_linear = tl.where(live, upstream * result, 0.0)
                total_linear += tl.sum(of_linear, 0)
                tl.store(grad_inner + at + H, of_linear.to(grad_inner.dtype.element_ty), mask=inside)
                upstream *= linear
                result *= linear
            if DROPS:
                result *= scale
            tl.store(hidden + target, tl.where(live, result, 0.0).to(hidden.dtype.element_ty), mask=inside)
        elif DROPS:
            upstream *= factor  # relu's result is zero where the unit was dropped
        inner = tl.where(live, upstream * slope(value, KIND), 0.0)
        total += tl.sum(inner, 0)
        tl.store(grad_inner + at, inner.to(grad_inner.dtype.element_ty), mask=inside)
    sum_at = sums + tile.to(tl.int64) * width + column
    tl.store(sum_at, total, mask=column < H)
    if GATED:
        tl.store(sum_at + H, total_linear, mask=column < H)


def run(
    grad: Tensor, kept: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.bias_activation_backward."""
    rows, hidden_dim, experts = grad.size(0), grad.size(1), ends.size(0)
    recomputes = activation != "relu"
    hidden = grad.new_empty(rows if recomputes else 0, hidden_dim)
    tiles = num_tiles(rows, experts, BIAS_TILE)
    sums = grad.new_empty(tiles, kept.size(1), dtype=torch.float32)
    grad_inner = torch.empty_like(kept)
    options = kind_of(activation), activation in GATED, factor != 1, recomputes, BIAS_TILE, STEP, COLUMNS, padded_groups(experts)
    given = grad if keep is None else keep
    sizes = rows, hidden_dim, experts, factor
    grid = (triton.cdiv(hidden_dim, COLUMNS) * tiles,)
    _kernel[grid](grad, kept, bias, ends, given, grad_inner, hidden, sums, *sizes, *options)
    return grad_inner, hidden, sums
