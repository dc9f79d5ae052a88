"""Gather and cast: the token of each pair, in the order of the pairs."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 256


@triton.jit
def _kernel(tokens, pairs, ends, out, N, M, E, K: tl.constexpr, HAS_ENDS: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    routed = N
    if HAS_ENDS:
        routed = tl.load(ends + E - 1)
    token = tl.load(pairs + row, mask=row < N, other=0) // K  # int64
    inside = (row < N)[:, None] & (column < M)[None, :]
    value = tl.load(tokens + token[:, None] * M + column[None, :], mask=inside & (row < routed)[:, None], other=0.0)
    tl.store(out + row[:, None].to(tl.int64) * M + column[None, :], value.to(out.dtype.element_ty), mask=inside)


def run(tokens: Tensor, pairs: Tensor, ends: Optional[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """See ops.gather_rows."""
    rows, width = pairs.size(0), tokens.size(1)
    out = tokens.new_empty(rows, width, dtype=dtype)
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
    if out.numel():
        last = 1 if ends is None else ends.size(0)
        _kernel[grid](tokens, pairs, pairs if ends is None else ends, out, rows, width, last, k, ends is not None, ROWS, COLUMNS)
    return out
