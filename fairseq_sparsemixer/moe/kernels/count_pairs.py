"""The first half of a stable counting sort: the pairs of each block by expert; the last column counts unrouted ones."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import BLOCK, num_blocks

MOST = 8192  # comparisons of pairs with experts at once


def step_of(groups: int) -> int:
    """Pairs to look at at once."""
    return max(min(32, MOST // groups), 1)


@triton.jit
def expert_of(expert_index, unrouted, pair, P, E, HAS_UNROUTED: tl.constexpr):
    """The expert of each pair, E where it is unrouted, -1 behind the last pair."""
    expert = tl.load(expert_index + pair, mask=pair < P, other=-1).to(tl.int32)
    if HAS_UNROUTED:
        expert = tl.where(tl.load(unrouted + pair, mask=pair < P, other=0) != 0, E, expert)
    return expert


@triton.jit
def _kernel(expert_index, unrouted, counts, P, E, HAS_UNROUTED: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
            GROUPS: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    total = tl.zeros([GROUPS], tl.int32)
    for first in range(0, BLOCK, STEP):
        pair = block * BLOCK + first + tl.arange(0, STEP)
        expert = expert_of(expert_index, unrouted, pair, P, E, HAS_UNROUTED)
        total += tl.sum((expert[:, None] == group[None, :]).to(tl.int32), 0)
    tl.store(counts + block * (E + 1) + group, total, mask=group <= E)


def run(expert_index: Tensor, unrouted: Optional[Tensor], num_experts: int) -> Tensor:
    """See ops.count_pairs."""
    pairs = expert_index.numel()
    counts = expert_index.new_empty(num_blocks(pairs), num_experts + 1, dtype=torch.int32)
    groups = triton.next_power_of_2(num_experts + 1)
    options = unrouted is not None, BLOCK, step_of(groups), groups
    given = expert_index if unrouted is None else unrouted
    _kernel[(counts.size(0),)](expert_index, given, counts, pairs, num_experts, *options)
    return counts
