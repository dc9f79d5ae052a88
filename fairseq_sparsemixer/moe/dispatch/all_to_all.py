"""Dispatch to experts sharded over several ranks. Dropless: a rank may send any number of rows, including none.

G ranks, L = E / G local experts. Rows are sent sorted by expert, so that those for one rank are contiguous. They arrive in
blocks (sender, local expert). With L = 1 these are in the experts' order, and nothing is copied. Otherwise one copy puts them
into the order (local expert, sender), and another one the outputs back. Blocks in the order of arrival could be G * L groups of
rows with repeated weights instead, but each weight would then be read, and its gradient written, G times, for products of
fewer rows: slower by measurement and by the cost model (benchmarks/NOTES.md).

With N chunks, each takes an equal share of every expert's rows, in the order (chunk, expert). Both sides derive the sizes of
chunks from the same counts, so they are exchanged once. exchange.py says what runs at the same time, route.py how rows travel
between nodes.
"""

from typing import Callable, List, NamedTuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.dispatch.blocks import Sizes, transpose_blocks, transposed
from fairseq_sparsemixer.moe.dispatch.exchange import Transfer, finish_dispatch, finish_return, start_dispatch, start_return
from fairseq_sparsemixer.moe.dispatch.local import ExpertsFunction
from fairseq_sparsemixer.moe.dispatch.pairs import sorted_pairs
from fairseq_sparsemixer.moe.dispatch.route import Route, exchange_counts, plan_route
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.parallel import ExpertGroup


class ExchangePlan(NamedTuple):
    """Of one chunk. received: the rows that arrive, by (sender, local expert) [G][L].

    device_counts: rows of each local expert [L], on the device.
    """

    route: Route
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
    tables = exchange_counts(counts.view(expert_group.size, -1), expert_group)
    on_host = split_counts(torch.stack(tables).cpu(), expert_group.chunks).tolist()  # [N][2 or 3][G][L]
    arriving = split_counts(tables[-1], expert_group.chunks).sum(1)  # [N, L]
    return [ExchangePlan(plan_route(sizes, expert_group), sizes[-1], on_device) for sizes, on_device in zip(on_host, arriving)]


def split_counts(counts: Tensor, chunks: int) -> Tensor:
    """counts [...] -> [chunks, ...]: parts that sum to the counts and differ by at most 1."""
    if chunks == 1:
        return counts.unsqueeze(0)
    steps = torch.arange(chunks + 1, device=counts.device).view(-1, *[1] * counts.dim())
    return (steps * counts).div(chunks, rounding_mode="floor").diff(dim=0)


@torch.no_grad()
def order_to_send(counts: Tensor, expert_group: ExpertGroup, total: int) -> Tensor:
    """The permutation from the order by expert to that in which rows leave; counts [E] sum to `total`.

    That is (chunk, expert), where a route in two steps takes the experts by (place of their rank in its node, node).
    """
    chunks = expert_group.chunks
    parts = split_counts(counts, chunks)  # [chunks, E]
    by_expert = parts.t().flatten()
    source = (by_expert.cumsum(0) - by_expert).view(-1, chunks).t()  # [chunks, E], where a block's rows are now
    parts, source = _as_sent(parts, expert_group), _as_sent(source, expert_group)
    target = parts.cumsum(0) - parts  # where they start
    shift = (source - target).repeat_interleave(parts, output_size=total)
    return torch.arange(total, device=counts.device) + shift


def _as_sent(blocks: Tensor, expert_group: ExpertGroup) -> Tensor:
    """blocks [chunks, E] -> [chunks * E] in the order in which they leave."""
    if expert_group.nodes is None:
        return blocks.flatten()
    nodes = expert_group.size // expert_group.nodes.ranks
    return blocks.reshape(len(blocks), nodes, expert_group.nodes.ranks, -1).transpose(1, 2).flatten()


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
    counts = pairs.counts
    plans = plan_exchange(counts, expert_group)
    total = sum(plan.route.num_outward for plan in plans)
    if not expert_group.in_one_exchange:
        pairs.reorder(order_to_send(counts, expert_group, total))
    there = [Transfer(plan.route, expert_group, outward=True) for plan in plans]
    back = [Transfer(plan.route, expert_group, outward=False) for plan in plans]
    tickets = start_dispatch(pairs.gather(tokens, total), there)
    meanwhile()
    returning = []
    for plan, ticket, coming, going in zip(plans, tickets, there, back):
        outputs = _run(experts, finish_dispatch(ticket, coming), plan, counts_on_device)
        returning.append(start_return(outputs, going))
    return pairs.combine(finish_return(returning, back))


def _run(experts: ExpertsFunction, arrived: Tensor, plan: ExchangePlan, counts_on_device: bool) -> Tensor:
    """The experts' outputs for the rows [N, M] of a chunk, in their order."""
    by_expert = transpose_blocks(arrived, plan.received)
    outputs = experts(by_expert, plan.device_counts if counts_on_device else plan.counts)
    return transpose_blocks(outputs, transposed(plan.received))
