"""The router's projection: tokens of any precision times float32 weights, in float32, without a float32 copy of the tokens.

Products of three TF32 parts (tf32x3) on tensor cores are as exact as float32 to about 1e-6; half precision fits into TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, STEP, MOST_EXPERTS = 64, 32, 64


@triton.jit
def _kernel(tokens, weight, logits, S, M, E, R: tl.constexpr, STEP: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0) * R + tl.arange(0, R)
    expert = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([R, C], tl.float32)
    for first in range(0, M, STEP):
        inner = first + tl.arange(0, STEP)
        left_at = tokens + token[:, None].to(tl.int64) * M + inner[None, :]
        left = tl.load(left_at, mask=(token < S)[:, None] & (inner < M)[None, :], other=0.0)
        right_at = weight + expert[None, :] * M + inner[:, None]
        right = tl.load(right_at, mask=(expert < E)[None, :] & (inner < M)[:, None], other=0.0)
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="tf32x3")
    target = logits + token[:, None].to(tl.int64) * E + expert[None, :]
    tl.store(target, total, mask=(token < S)[:, None] & (expert < E)[None, :])


def run(tokens: Tensor, weight: Tensor) -> Tensor:
    """See ops.project."""
    total, width, experts = tokens.size(0), tokens.size(1), weight.size(0)
    logits = tokens.new_empty(total, experts, dtype=torch.float32)
    columns = min(max(triton.next_power_of_2(experts), 16), MOST_EXPERTS)  # a product needs at least 16
    if total:
        grid = (triton.cdiv(total, TOKENS), triton.cdiv(experts, columns))
        _kernel[grid](tokens, weight, logits, total, width, experts, TOKENS, STEP, columns)
    return logits
