"""Bias and activation of the hidden layer in one pass, with dropout; zeros behind the last expert's rows."""

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.activations import GATED, curve, kind_of
from fairseq_sparsemixer.moe.kernels.sizes import num_tiles
from fairseq_sparsemixer.moe.kernels.tiles import padded_groups, tile_of

TILE, COLUMNS = 32, 128


@triton.jit
def _kernel(product, bias, ends, keep, out, N, H, E, factor, KIND: tl.constexpr, GATED: tl.constexpr, DROPS: tl.constexpr,
            TILE: tl.constexpr, C: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    across = tl.cdiv(H, C)
    expert, begin, stop, end = tile_of(ends, tl.program_id(0) // across, N, E, TILE, GROUPS)
    row = begin + tl.arange(0, TILE)
    column = (tl.program_id(0) % across) * C + tl.arange(0, C)
    inside = (row < stop)[:, None] & (column < H)[None, :]
    live = (row < end)[:, None] & (column < H)[None, :]
    width = 2 * H if GATED else H
    at = row[:, None].to(tl.int64) * width + column[None, :]
    own = expert.to(tl.int64) * width + column
    mask = column < H
    value = tl.load(product + at, mask=live, other=0.0).to(tl.float32)
    value = curve(value + tl.load(bias + own, mask=mask, other=0.0).to(tl.float32)[None, :], KIND)
    if GATED:
        linear = tl.load(product + at + H, mask=live, other=0.0).to(tl.float32)
        value *= linear + tl.load(bias + own + H, mask=mask, other=0.0).to(tl.float32)[None, :]
    target = row[:, None].to(tl.int64) * H + column[None, :]
    if DROPS:
        kept = tl.load(keep + target, mask=live, other=0)
        value *= tl.where(kept != 0, factor, 0.0)
    tl.store(out + target, tl.where(live, value, 0.0).to(out.dtype.element_ty), mask=inside)


def run(product: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float) -> Tensor:
    """See ops.bias_activation."""
    rows, width, experts = product.size(0), product.size(1), ends.size(0)
    hidden = width // 2 if activation in GATED else width
    out = product.new_empty(rows, hidden)
    if out.numel():
        grid = (triton.cdiv(hidden, COLUMNS) * num_tiles(rows, experts, TILE),)  # other axes have at most 65,535 programs
        options = kind_of(activation), activation in GATED, keep is not None, TILE, COLUMNS, padded_groups(experts)
        _kernel[grid](product, bias, ends, product if keep is None else keep, out, rows, hidden, experts, factor, *options)
    return out
