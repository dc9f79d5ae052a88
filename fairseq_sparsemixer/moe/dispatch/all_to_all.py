"""Dispatch to experts sharded over several ranks. Dropless: a rank may send any number of rows, including none.

G ranks, L = E / G local experts. Rows are sent sorted by expert, so that those for one rank are contiguous. They arrive in
blocks (sender, local expert). With L = 1 these are in the experts' order, and nothing is copied. Otherwise one copy puts them
into the order (local expert, sender), and another one the outputs back. Blocks in the order of arrival could be G * L groups of
rows with repeated weights instead, but each weight would then be read, and its gradient written, G times, for products of
fewer rows: slower by measurement and by the cost model (benchmarks/NOTES.md).

With N chunks, each takes an equal share of every expert's rows, in the order (chunk, expert). Both sides derive the sizes of
chunks from the same counts, so they are exchanged once. exchange.py says what runs at the same time.
"""

from typing import Callable, List, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.blocks import Sizes, transpose_blocks, transposed
from fairseq_sparsemixer.moe.dispatch.exchange import Transfer, arrive, come_home, depart, send_home
from fairseq_sparsemixer.moe.dispatch.local import ExpertsFunction
from fairseq_sparsemixer.moe.dispatch.pairs import sorted_pairs
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.parallel import ExpertGroup


class ExchangePlan(NamedTuple):
    """Of one chunk. send: rows to each rank [G]. received: the rows that arrive, by (sender, local expert) [G][L].

    device_counts: rows of each local expert [L], on the device.
    """

    send: List[int]
    received: Sizes
    device_counts: Tensor

    @property
    def counts(self) -> List[int]:
        """Rows of each local expert [L]."""
        return [sum(column) for column in zip(*self.received)]


@torch.no_grad()
def plan_exchange(counts: Tensor, expert_group: ExpertGroup) -> List[ExchangePlan]:
    """Exchange row counts, so that every rank knows how many rows each of its experts gets -> the plan of each chunk.

    counts [E]: this rank's rows. One host synchronisation, to read the sizes.
    """
    outgoing = counts.view(expert_group.size, -1)  # [G, L]
    incoming = torch.empty_like(outgoing)
    with expert_group.measured(counts.device):
        dist.all_to_all_single(incoming, outgoing, group=expert_group.group)
    on_host = split_counts(torch.stack([outgoing, incoming]).cpu(), expert_group.chunks).tolist()  # [N][2][G][L]
    arriving = split_counts(incoming, expert_group.chunks).sum(1)  # [N, L]
    return [
        ExchangePlan([sum(line) for line in sent], received, on_device) for (sent, received), on_device in zip(on_host, arriving)
    ]


def split_counts(counts: Tensor, chunks: int) -> Tensor:
    """counts [...] -> [chunks, ...]: parts that sum to the counts and differ by at most 1."""
    if chunks == 1:
        return counts.unsqueeze(0)
    steps = torch.arange(chunks + 1, device=counts.device).view(-1, *[1] * counts.dim())
    return (steps * counts).div(chunks, rounding_mode="floor").diff(dim=0)


@torch.no_grad()
def order_by_chunk(counts: Tensor, chunks: int, total: int) -> Tensor:
    """The permutation from the order by expert to that by (chunk, expert); counts [E] sum to `total`."""
    parts = split_counts(counts, chunks)  # [chunks, E]
    target = parts.flatten().cumsum(0) - parts.flatten()  # where a block starts
    by_expert = parts.t().flatten()
    source = (by_expert.cumsum(0) - by_expert).view(-1, chunks).t().flatten()  # where its rows are now
    shift = (source - target).repeat_interleave(parts.flatten(), output_size=total)
    return torch.arange(total, device=counts.device) + shift


def dispatch_all_to_all(
    tokens: Tensor,
    routing: Routing,
    experts: ExpertsFunction,
    expert_group: ExpertGroup,
    counts_on_device: bool = False,
    fused: bool = False,
    meanwhile: Callable[[], object] = lambda: None,
) -> Tensor:
    """As dispatch_locally, with experts sharded over the ranks of a group; every rank of the group must call it.

    tokens [S, M] of this rank -> [S, M]; `experts` computes this rank's shard of the experts. fused: rows are moved by the
    fused kernels. `meanwhile` is called once, while tokens travel.
    """
    pairs = sorted_pairs(routing, fused)
    plans = plan_exchange(pairs.counts, expert_group)
    total = sum(sum(plan.send) for plan in plans)
    if len(plans) > 1:
        pairs.reorder(order_by_chunk(pairs.counts, len(plans), total))
    receive = [[sum(line) for line in plan.received] for plan in plans]
    there = [Transfer(plan.send, rows, expert_group) for plan, rows in zip(plans, receive)]
    back = [Transfer(rows, plan.send, expert_group) for plan, rows in zip(plans, receive)]
    tickets = depart(pairs.gather(tokens, total), there)
    meanwhile()
    returning = []
    for plan, ticket, coming, going in zip(plans, tickets, there, back):
        outputs = _run(experts, arrive(ticket, coming), plan, counts_on_device)
        returning.append(send_home(outputs, going))
    return pairs.combine(come_home(returning, back))


def _run(experts: ExpertsFunction, arrived: Tensor, plan: ExchangePlan, counts_on_device: bool) -> Tensor:
    """The experts' outputs for the rows [N, M] of a chunk, in their order."""
    by_expert = transpose_blocks(arrived, plan.received)
    outputs = experts(by_expert, plan.device_counts if counts_on_device else plan.counts)
    return transpose_blocks(outputs, transposed(plan.received))
