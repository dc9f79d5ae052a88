"""Dispatch to experts sharded over several ranks. Dropless: a rank may send any number of rows, including none.

G ranks, L = E / G local experts. Rows are sent sorted by expert, so that those for one rank are contiguous. They arrive
sorted by (sender, local expert) and are reordered by local expert for the computation.
"""

from typing import List, NamedTuple, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.local import ExpertsFunction
from fairseq_sparsemixer.moe.dispatch.pairs import sorted_pairs
from fairseq_sparsemixer.moe.dispatch.sorting import gather
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.parallel import AllToAllRows, ExpertGroup


class ExchangePlan(NamedTuple):
    """send, receive: rows to and from each rank [G]. order: [N], sorts received rows by local expert; None: already sorted.

    counts, device_counts: rows of each local expert [L], on the host and on the device.
    """

    send: List[int]
    receive: List[int]
    order: Optional[Tensor]
    counts: List[int]
    device_counts: Tensor


@torch.no_grad()
def plan_exchange(counts: Tensor, expert_group: ExpertGroup) -> ExchangePlan:
    """Exchange row counts, so that every rank knows how many rows each of its experts gets. counts [E]: this rank's rows.

    One host synchronisation, to read the sizes.
    """
    outgoing = counts.view(expert_group.size, -1)  # [G, L]
    incoming = torch.empty_like(outgoing)
    with expert_group.measured(counts.device):
        dist.all_to_all_single(incoming, outgoing, group=expert_group.group)
    send, receive = torch.stack([outgoing, incoming]).cpu()
    return ExchangePlan(
        send=send.sum(1).tolist(),
        receive=receive.sum(1).tolist(),
        order=None if incoming.size(1) == 1 else _by_local_expert(incoming, int(receive.sum())),
        counts=receive.sum(0).tolist(),
        device_counts=incoming.sum(0),
    )


def _by_local_expert(incoming: Tensor, total: int) -> Tensor:
    """The permutation from (sender, local expert) to (local expert, sender) order; incoming [G, L] sums to `total`."""
    local_expert = torch.arange(incoming.size(1), device=incoming.device).repeat(incoming.size(0))  # [G * L]
    return local_expert.repeat_interleave(incoming.flatten(), output_size=total).argsort(stable=True)


def dispatch_all_to_all(
    tokens: Tensor,
    routing: Routing,
    experts: ExpertsFunction,
    expert_group: ExpertGroup,
    counts_on_device: bool = False,
    fused: bool = False,
) -> Tensor:
    """As dispatch_locally, with experts sharded over the ranks of a group; every rank of the group must call it.

    tokens [S, M] of this rank -> [S, M]; `experts` computes this rank's shard of the experts. fused: rows are moved by the
    fused kernels.
    """
    pairs = sorted_pairs(routing, fused)
    plan = plan_exchange(pairs.counts, expert_group)
    arrived = AllToAllRows.apply(pairs.gather(tokens, sum(plan.send)), plan.send, plan.receive, expert_group)
    received = plan.device_counts if counts_on_device else plan.counts
    if plan.order is None:
        outputs = experts(arrived, received)
    else:
        outputs = _permute(experts(_permute(arrived, plan.order), received), invert(plan.order))
    home = AllToAllRows.apply(outputs, plan.receive, plan.send, expert_group)
    return pairs.combine(home)


def invert(order: Tensor) -> Tensor:
    """The inverse of a permutation [N]."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _permute(rows: Tensor, order: Tensor) -> Tensor:
    return gather(rows, order, 1)
