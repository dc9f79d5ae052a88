"""Dispatch with a capacity to experts on several ranks, as in GShard: every rank sends the same number of rows per expert.

G ranks, L = E / G local experts, capacity C. Missing rows are sent as zeros, so with a loose capacity all_to_all.py sends
less. The exchange is fairscale's.
"""

import warnings
from typing import Any, Tuple

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.local import ExpertsFunction
from fairseq_sparsemixer.moe.dispatch.pairs import sorted_pairs
from fairseq_sparsemixer.moe.dispatch.sorting import gather, scatter_rows
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.parallel import ExpertGroup

with warnings.catch_warnings():  # fairscale still spells torch.cuda.amp's old names
    warnings.simplefilter("ignore", FutureWarning)
    from fairscale.nn.moe.moe_layer import _AllToAll


class _MeasuredAllToAll(torch.autograd.Function):
    """fairscale's all-to-all of rows [E * C, M], timed by the group's timer."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, expert_group: ExpertGroup) -> Tensor:
        ctx.expert_group = expert_group
        with expert_group.measured(rows.device):
            received: Tensor = _AllToAll.forward(ctx, expert_group.group, rows)
        return received

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        with ctx.expert_group.measured(grad.device):
            return _AllToAll.backward(ctx, grad)[1], None


def dispatch_equal_split(
    tokens: Tensor,
    routing: Routing,
    experts: ExpertsFunction,
    expert_group: ExpertGroup,
    counts_on_device: bool = False,
    fused: bool = False,
) -> Tensor:
    """As dispatch_all_to_all, in blocks of C rows per expert; every rank of the group must call it.

    C is the largest number of rows that any rank of the group has for any expert after dropping: gates drop by their own
    rank's token count, which differs between ranks. One host synchronisation, to read the sizes.
    """
    num_experts, model_dim = routing.num_experts, tokens.size(1)
    local = num_experts // expert_group.size
    pairs = sorted_pairs(routing, fused)
    counts = pairs.counts
    capacity, routed = _agree_on_capacity(counts, expert_group)
    slots = _slots(counts, capacity, routed)
    blocks = scatter_rows(pairs.gather(tokens, routed), slots, num_experts * capacity, 1)  # [E * C, M], zero-padded
    arrived = _MeasuredAllToAll.apply(blocks, expert_group).view(expert_group.size, local, capacity, model_dim)
    rows = expert_group.size * capacity
    received = torch.full((local,), rows, device=tokens.device) if counts_on_device else [rows] * local
    outputs = experts(arrived.transpose(0, 1).reshape(-1, model_dim), received)
    outputs = outputs.view(local, expert_group.size, capacity, model_dim).transpose(0, 1)  # [G, L, C, M]
    returned = gather(_MeasuredAllToAll.apply(outputs.reshape(-1, model_dim), expert_group), slots, 1)  # [N, M]
    return pairs.combine(returned)


@torch.no_grad()
def _agree_on_capacity(counts: Tensor, expert_group: ExpertGroup) -> Tuple[int, int]:
    """C, the maximum over the group (at least 1), and the number of rows on this rank."""
    capacity = counts.max().clamp(min=1)
    with expert_group.measured(counts.device):
        dist.all_reduce(capacity, op=dist.ReduceOp.MAX, group=expert_group.group)
    agreed, routed = torch.stack([capacity, counts.sum()]).tolist()
    return agreed, routed


@torch.no_grad()
def _slots(counts: Tensor, capacity: int, routed: int) -> Tensor:
    """[N]: the slot, out of E * C, of each row grouped by expert."""
    shift = torch.arange(len(counts), device=counts.device) * capacity - (counts.cumsum(0) - counts)  # [E]
    return torch.arange(routed, device=counts.device) + shift.repeat_interleave(counts, output_size=routed)
