"""The second half of the counting sort: the order of the pairs by expert, its inverse, and the end of each expert's pairs."""

from typing import Optional, Tuple

import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.count_pairs import expert_of, step_of
from fairseq_sparsemixer.moe.kernels.sizes import BLOCK

BLOCKS = 16  # read at once


@triton.jit
def _kernel(expert_index, unrouted, counts, pairs, place, ends, P, E, NUM_BLOCKS, HAS_UNROUTED: tl.constexpr,
            BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr):  # fmt: skip
    block = tl.program_id(0)
    group = tl.arange(0, GROUPS)
    before = tl.zeros([GROUPS], tl.int32)
    total = tl.zeros([GROUPS], tl.int32)
    for first in range(0, NUM_BLOCKS, BLOCKS):
        other = first + tl.arange(0, BLOCKS)
        mask = (other < NUM_BLOCKS)[:, None] & (group <= E)[None, :]
        found = tl.load(counts + other[:, None] * (E + 1) + group[None, :], mask=mask, other=0)
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), 0)
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + group, end, mask=group < E)
    following = end - total + before  # the place of each expert's next pair
    for first in range(0, BLOCK, STEP):
        pair = block * BLOCK + first + tl.arange(0, STEP)
        expert = expert_of(expert_index, unrouted, pair, P, E, HAS_UNROUTED)
        member = (expert[:, None] == group[None, :]).to(tl.int32)
        rank = tl.cumsum(member, 0) - member  # members before, of the same step
        at = tl.sum(member * (following[None, :] + rank), 1)
        tl.store(place + pair, at, mask=pair < P)
        tl.store(pairs + at, pair.to(tl.int64), mask=pair < P)
        following += tl.sum(member, 0)


def run(expert_index: Tensor, unrouted: Optional[Tensor], counts: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.place_pairs."""
    total, experts = expert_index.numel(), counts.size(1) - 1
    pairs = expert_index.new_empty(total)
    place, ends = counts.new_empty(total), counts.new_empty(experts)
    groups = triton.next_power_of_2(experts + 1)
    options = unrouted is not None, BLOCK, step_of(groups), BLOCKS, groups
    given = expert_index if unrouted is None else unrouted
    _kernel[(counts.size(0),)](expert_index, given, counts, pairs, place, ends, total, experts, counts.size(0), *options)
    return pairs, place, ends
