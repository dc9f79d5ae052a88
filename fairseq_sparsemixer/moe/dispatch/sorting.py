"""Token-expert pairs in the order of their experts: one stable sort, linear in pairs.

Pair p = s * k + j is the j-th choice of token s. Pairs that are not routed (padding, dropped) are left out.
"""

from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing


class SortedPairs(NamedTuple):
    """pairs: [N] int64, the routed pairs, grouped by expert and by position within. counts: N_e for each expert."""

    pairs: Tensor
    counts: List[int]


@torch.no_grad()
def order_pairs(routing: Routing) -> Tuple[Tensor, Tensor]:
    """All pairs [S * k] grouped by expert, those not routed at the end; and the routed ones of each expert [E].

    Waits for nothing on the device.
    """
    num_experts = routing.num_experts
    expert = routing.expert_index.reshape(-1)  # [S * k]
    unrouted = routing.unrouted()
    if unrouted is not None:
        expert = expert.masked_fill(unrouted.reshape(-1), num_experts)  # behind the last expert
    counts = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))  # bincount would wait
    return expert.argsort(stable=True), counts[:num_experts]


def sort_pairs(routing: Routing) -> SortedPairs:
    """Group the routed pairs of a Routing by expert. One host synchronisation, to read the counts."""
    pairs, counts = order_pairs(routing)
    counts = counts.tolist()
    return SortedPairs(pairs[: sum(counts)], counts)


class _Gather(torch.autograd.Function):
    """tokens [S, M] -> the token of each pair [N, M]. Its backward adds a token's pairs without atomics."""

    @staticmethod
    def forward(ctx, tokens: Tensor, pairs: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.num_tokens, ctx.k = tokens.size(0), k
        return tokens.index_select(0, pairs if k == 1 else pairs // k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (pairs,) = ctx.saved_tensors
        return scatter_rows(grad, pairs, ctx.num_tokens, ctx.k), None, None


def gather(tokens: Tensor, pairs: Tensor, k: int) -> Tensor:
    """tokens [S, M], pairs [N] -> [N, M], row n is the token of pair n."""
    return _Gather.apply(tokens, pairs, k)


def scatter_rows(rows: Tensor, pairs: Tensor, num_tokens: int, k: int) -> Tensor:
    """rows [N, M] of pairs [N] -> [S, M]: each token gets the sum of its pairs' rows, zero where it has none."""
    everywhere = pairs.size(0) == num_tokens * k  # no slot is left to be zero
    slots = (rows.new_empty if everywhere else rows.new_zeros)(num_tokens * k, rows.size(1)).index_copy_(0, pairs, rows)
    return slots if k == 1 else slots.view(num_tokens, k, rows.size(1)).sum(1)
