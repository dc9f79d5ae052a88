"""Token-expert pairs sorted by expert: one stable sort, linear in pairs.

Pair p = s * k + j is the j-th choice of token s. Unrouted pairs (padding, dropped) are left out.
"""

from typing import Any, List, NamedTuple, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing


class SortedPairs(NamedTuple):
    """pairs: [N] int64, the routed pairs, grouped by expert and ordered by position within. counts: N_e of each expert."""

    pairs: Tensor
    counts: List[int]


@torch.no_grad()
def order_pairs(routing: Routing) -> Tuple[Tensor, Tensor]:
    """All pairs [S * k] grouped by expert, unrouted ones last, and the number of routed pairs of each expert [E].

    No host synchronisation.
    """
    num_experts = routing.num_experts
    expert = routing.expert_index.reshape(-1)  # [S * k]
    unrouted = routing.unrouted()
    if unrouted is not None:
        expert = expert.masked_fill(unrouted.reshape(-1), num_experts)  # sorts after the last expert
    counts = expert.new_zeros(num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))  # bincount would synchronise
    return expert.argsort(stable=True), counts[:num_experts]


def sort_pairs(routing: Routing) -> SortedPairs:
    """Group the routed pairs of a Routing by expert. One host synchronisation, to read the counts."""
    pairs, on_device = order_pairs(routing)
    counts: List[int] = on_device.tolist()
    return SortedPairs(pairs[: sum(counts)], counts)


class _Gather(torch.autograd.Function):
    """tokens [S, M] -> the token of each pair [N, M]. Backward sums the gradients of a token's pairs without atomics."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, pairs: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(pairs)
        ctx.num_tokens, ctx.k = tokens.size(0), k
        return tokens.index_select(0, pairs if k == 1 else pairs // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        (pairs,) = ctx.saved_tensors
        return scatter_rows(grad, pairs, ctx.num_tokens, ctx.k), None, None


def gather(tokens: Tensor, pairs: Tensor, k: int) -> Tensor:
    """tokens [S, M], pairs [N] -> [N, M], row n is the token of pair n."""
    gathered: Tensor = _Gather.apply(tokens, pairs, k)
    return gathered


def scatter_rows(rows: Tensor, pairs: Tensor, num_tokens: int, k: int) -> Tensor:
    """rows [N, M] of pairs [N] -> [S, M]: each token gets the sum of its pairs' rows, zero if it has none."""
    everywhere = pairs.size(0) == num_tokens * k  # every slot is written
    slots = (rows.new_empty if everywhere else rows.new_zeros)(num_tokens * k, rows.size(1)).index_copy_(0, pairs, rows)
    return slots if k == 1 else slots.view(num_tokens, k, rows.size(1)).sum(1, dtype=rows.dtype)
