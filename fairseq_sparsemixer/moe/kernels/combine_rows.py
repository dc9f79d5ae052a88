"""Combine: each token's sum of its rows, with the output bias, the combine weights and a scale; also the backward of a gather."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS = 16, 256


@triton.jit
def _kernel(rows, place, ends, weight, bias, expert, scale, out, S, N, M, E, K: tl.constexpr, HAS_ENDS: tl.constexpr,
            HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, R: tl.constexpr,
            C: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    there, inside = token < S, column < M
    routed = N
    if HAS_ENDS:
        routed = tl.minimum(routed, tl.load(ends + E - 1))
    if HAS_SCALE:
        factor = tl.load(scale + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([R, C], tl.float32)
    for choice in range(K):
        pair = token.to(tl.int64) * K + choice
        row = tl.load(place + pair, mask=there, other=0)
        live = there & (row >= 0) & (row < routed)
        mask = live[:, None] & inside[None, :]
        value = tl.load(rows + row[:, None].to(tl.int64) * M + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            index = tl.load(expert + pair, mask=live, other=0)
            value += tl.load(bias + index[:, None] * M + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            value *= tl.load(weight + pair, mask=live, other=0.0).to(tl.float32)[:, None]
        if HAS_SCALE:
            value *= factor[None, :]
        total += tl.where(mask, value, 0.0)
    target = out + token[:, None].to(tl.int64) * M + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=there[:, None] & inside[None, :])


def run(
    rows: Tensor,
    place: Tensor,
    ends: Optional[Tensor],
    k: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    expert_index: Optional[Tensor],
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """See ops.combine_rows."""
    tokens, width = place.size(0) // k, rows.size(1)
    out = rows.new_empty(tokens, width, dtype=dtype)
    grid = (triton.cdiv(tokens, TOKENS), triton.cdiv(width, COLUMNS))
    if out.numel():
        given = [place if tensor is None else tensor for tensor in (ends, weight, bias, expert_index, scale)]
        has = [tensor is not None for tensor in (ends, weight, bias, scale)]
        sizes = tokens, rows.size(0), width, 1 if ends is None else ends.size(0)
        _kernel[grid](rows, place, *given, out, *sizes, k, *has, TOKENS, COLUMNS)
    return out
