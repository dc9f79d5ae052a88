"""Expert parallelism: which ranks hold which experts, and the collectives between them.

W ranks form groups of G consecutive ranks. A group holds the E experts once, E / G on each rank. The W / G ranks with the
same index in their groups hold replicas of the same experts.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch import distributed as dist


class Elapsed(NamedTuple):
    """Milliseconds. cpu: wall time of the calling thread, waiting included. cuda: on the device's stream, 0 without one."""

    cpu: float
    cuda: float


class CollectiveTimer:
    """Time spent in all-to-alls (forward and backward) since the last read."""

    def __init__(self) -> None:
        self._cpu = 0.0
        self._events: List[Tuple[Any, Any]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block, without a device synchronisation."""
        events = None
        if device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        start = time.perf_counter()
        yield
        self._cpu += 1000 * (time.perf_counter() - start)
        if events:
            events[1].record()
            self._events.append(events)

    def read(self) -> Elapsed:
        """Return the accumulated time and reset it to zero. Synchronises with the device."""
        if self._events:
            self._events[-1][1].synchronize()
        elapsed = Elapsed(self._cpu, sum(start.elapsed_time(stop) for start, stop in self._events))
        self._cpu, self._events = 0.0, []
        return elapsed


@dataclass(frozen=True)
class RankGroup:
    """A torch process group that a model can hold: torch cannot copy or pickle one, and fairseq's EMA copies models."""

    handle: Any

    def __deepcopy__(self, memo: Dict[int, Any]) -> "RankGroup":
        return self


class Nodes(NamedTuple):
    """How the G ranks of a group lie on nodes, for an exchange in two steps. ranks: P, of the group in each of G / P nodes.

    inside: the P ranks of this rank's node, in order. between: the G / P ranks at this rank's place in their nodes.
    """

    ranks: int
    inside: Any
    between: Any


@dataclass(frozen=True)
class ExpertGroup:
    """This rank's position in expert parallelism.

    size: G. index: this rank's index in its group. group: the G ranks that together hold each expert once. replicas: the
    W / G ranks that hold the same experts as this one. world_size: W. first_group: whether this is the group of rank 0.
    timer: times the all-to-alls; None: no timing. chunks: the parts in which a layer's tokens are exchanged, so that the
    exchange of one overlaps the computation of another; 1: no overlap. nodes: for an exchange inside nodes first, then
    between them; None: one exchange among all ranks.
    """

    size: int
    index: int
    group: Any
    replicas: Any
    world_size: int
    first_group: bool
    timer: Optional[CollectiveTimer] = None
    chunks: int = 1
    nodes: Optional[Nodes] = None

    @property
    def in_one_exchange(self) -> bool:
        """Whether a layer's rows are exchanged at once, in one all-to-all."""
        return self.chunks == 1 and self.nodes is None

    @property
    def num_replicas(self) -> int:
        """W / G."""
        return self.world_size // self.size

    def __deepcopy__(self, memo: Dict[int, Any]) -> "ExpertGroup":
        return self  # process groups cannot be copied, and a copied model uses the same ranks

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Time the block with the timer, if there is one."""
        if self.timer is None:
            yield
        else:
            with self.timer.measure(device):
                yield


def expert_parallel_size(requested: Optional[int], world_size: int, num_experts: int) -> int:
    """G: `requested` if given, else the greatest common divisor of world_size and num_experts.

    Raises ValueError if `requested` does not divide both.
    """
    if requested is None:
        return math.gcd(world_size, num_experts)
    if requested < 1:
        raise ValueError(f"expert_parallel_size={requested} must be at least 1")
    if num_experts % requested:
        divisors = ", ".join(str(n) for n in range(1, num_experts + 1) if num_experts % n == 0 and world_size % n == 0)
        raise ValueError(
            f"num_experts={num_experts} cannot be split over expert_parallel_size={requested};"
            f" with {world_size} ranks, use one of {divisors}"
        )
    if world_size % requested:
        raise ValueError(
            f"expert_parallel_size={requested} does not divide the {world_size} ranks;"
            f" use a divisor of {math.gcd(world_size, num_experts)}"
        )
    return requested


def spans_nodes(size: int, ranks_per_node: Optional[int]) -> bool:
    """Whether groups of `size` ranks have several ranks in each of several nodes; None: unknown, so not.

    Raises ValueError if a group would have different numbers of ranks in its nodes.
    """
    if ranks_per_node is None:
        return False
    if ranks_per_node < 1 or (size % ranks_per_node and ranks_per_node % size):
        divisors = ", ".join(str(n) for n in range(2, size) if size % n == 0)
        raise ValueError(
            f"ranks_per_node={ranks_per_node} does not divide the {size} ranks that share the experts;"
            f" {f'use one of {divisors}, or ' if divisors else ''}leave it out for an exchange in one step"
        )
    return 1 < ranks_per_node < size


def form_expert_group(
    size: int,
    timeout: Optional[timedelta] = None,
    timer: Optional[CollectiveTimer] = None,
    chunks: int = 1,
    ranks_per_node: Optional[int] = None,
) -> ExpertGroup:
    """Create the process groups; every rank of the default group must call it, with the same arguments apart from the timer.

    size: G. timeout: how long a collective waits for the other ranks; None: torch's default for the backend. timer, chunks:
    see ExpertGroup. ranks_per_node: exchange tokens inside nodes first, then between them, if a group spans several; ranks are
    numbered node by node. Raises ValueError if chunks is below 1, and as spans_nodes.
    """
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1; 1 does not overlap the exchange with the computation")
    world_size, rank = dist.get_world_size(), dist.get_rank()
    groups = [list(range(first, first + size)) for first in range(0, world_size, size)]
    replicas = [list(range(index, world_size, size)) for index in range(size)]
    nodes = None
    if ranks_per_node is not None and spans_nodes(size, ranks_per_node):
        nodes = _nodes(size, ranks_per_node, rank, timeout)
    return ExpertGroup(
        size=size,
        index=rank % size,
        group=_own_group(groups, rank, timeout),
        replicas=_own_group(replicas, rank, timeout),
        world_size=world_size,
        first_group=rank < size,
        timer=timer,
        chunks=chunks,
        nodes=nodes,
    )


def _nodes(size: int, ranks_per_node: int, rank: int, timeout: Optional[timedelta]) -> Nodes:
    first = rank - rank % size  # of this rank's group
    inside = range(rank - rank % ranks_per_node, rank - rank % ranks_per_node + ranks_per_node)
    between = range(first + rank % ranks_per_node, first + size, ranks_per_node)
    groups = [dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True) for ranks in (inside, between)]
    return Nodes(ranks_per_node, *groups)


def _own_group(partition: List[List[int]], rank: int, timeout: Optional[timedelta]) -> Any:
    """This rank's group in the partition; only the group's own ranks synchronise to create it, for any cluster size."""
    ranks = next(ranks for ranks in partition if rank in ranks)
    return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks of a RankGroup or process group.

    In backward, every rank's tensor gets the gradients of all ranks' losses.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group.handle if isinstance(group, RankGroup) else group
        total = tensor.clone()
        dist.all_reduce(total, group=ctx.group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
