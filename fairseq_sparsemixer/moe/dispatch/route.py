"""The way of a chunk's rows from the ranks of their tokens to those of their experts: one all-to-all, or two.

An expert group of G = D * P ranks on D nodes: rank n * P + p is rank p of node n. In one step, rank (n, p) sends a message to
each (m, q). In two, it sends (n, q) of its own node all rows for the ranks q of all nodes, and (n, q) sends (m, q) the rows of
all ranks of node n. A rank then sends D - 1 messages between nodes instead of (D - 1) * P, each P times as large, and only to
ranks at its own place in their nodes, as in Tutel's 2DH (arXiv 2206.03382), here for any numbers of rows.

Rows leave in the order (q, m). They pass through (n, q) in blocks (p, m), which are put into the order (m, p), and arrive in the
order (n, p): that of one step, so the results are the same bit for bit.
"""

from typing import Any, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.blocks import Sizes, transposed
from fairseq_sparsemixer.moe.parallel import ExpertGroup


class Leg(NamedTuple):
    """An all-to-all: send[i] rows to the i-th rank of the process group, receive[i] from it."""

    send: List[int]
    receive: List[int]
    group: Any


class Route(NamedTuple):
    """inside: the leg inside the node; None: one step. passing: the rows that pass through this rank, in blocks (p, m) [P][D].

    between: the leg between nodes, or that among all ranks.
    """

    between: Leg
    inside: Optional[Leg] = None
    passing: Sizes = ()

    @property
    def num_outward(self) -> int:
        """The rows that leave this rank for experts."""
        return sum((self.inside or self.between).send)

    @property
    def num_returning(self) -> int:
        """The rows that arrive for this rank's experts, and return."""
        return sum(self.between.receive)


@torch.no_grad()
def exchange_counts(outgoing: Tensor, expert_group: ExpertGroup) -> List[Tensor]:
    """outgoing [G, L], the rows for each expert of each rank -> it, those that pass through this rank, those that arrive.

    passing [G, L]: for the ranks at this rank's place, by (node, sender in this node); missing in one step. The last [G, L] are
    the rows for this rank's experts, by sender.
    """
    nodes = expert_group.nodes
    with expert_group.measured(outgoing.device):
        if nodes is None:
            return [outgoing, _exchanged(outgoing, expert_group.group)]
        by_place = _swapped(outgoing, -1, nodes.ranks)  # [P * D, L]
        passing = _swapped(_exchanged(by_place, nodes.inside), nodes.ranks, -1)  # [D * P, L]
        return [outgoing, passing, _exchanged(passing, nodes.between)]


def _exchanged(counts: Tensor, group: Any) -> Tensor:
    received = torch.empty_like(counts)
    dist.all_to_all_single(received, counts, group=group)
    return received


def _swapped(counts: Tensor, outer: int, inner: int) -> Tensor:
    """counts [outer * inner, L] -> [inner * outer, L]."""
    return counts.view(outer, inner, counts.size(1)).transpose(0, 1).reshape(counts.shape)


def plan_route(counts: Sequence[Sizes], expert_group: ExpertGroup) -> Route:
    """The Route of a chunk whose counts are those of exchange_counts, on the host."""
    totals = [[sum(line) for line in table] for table in counts]  # [G] each
    nodes = expert_group.nodes
    if nodes is None:
        return Route(Leg(totals[0], totals[1], expert_group.group))
    outgoing, passing, arriving = (
        [total[first : first + nodes.ranks] for first in range(0, len(total), nodes.ranks)]
        for total in totals  # [D][P]
    )
    inside = Leg(_sums(transposed(outgoing)), _sums(transposed(passing)), nodes.inside)
    return Route(Leg(_sums(passing), _sums(arriving), nodes.between), inside, transposed(passing))


def _sums(table: Sizes) -> List[int]:
    return [sum(line) for line in table]
