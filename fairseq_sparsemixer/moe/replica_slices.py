"""Slices of expert parameters: each replica updates one, and needs an optimizer's state for no more than that.

This is ZeRO-1 (arXiv 1910.02054, P_os) within the R = W / G ranks that hold the same experts. A parameter of N numbers is cut
into R slices of ceil(N / R) consecutive numbers, the last of which may be shorter or empty. For optimizers that update each
number by itself, the result equals that of R whole updates.
"""

from contextlib import contextmanager
from typing import Iterable, Iterator, List, Optional

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import ExpertGroup

all_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # the former name


class ReplicaSlices:
    """The slices that this rank updates of `parameters`, which must be the same on all replicas, and contiguous."""

    def __init__(self, parameters: Iterable[nn.Parameter], expert_group: ExpertGroup):
        self.parameters = list(parameters)
        self.replicas, self.count = expert_group.replicas, expert_group.num_replicas
        self.index = dist.get_rank(self.replicas)

    def own(self, whole: Tensor) -> Tensor:
        """whole, of N numbers -> a view of this rank's slice, of one dimension."""
        size = self._size(whole)
        return whole.view(-1)[self.index * size : (self.index + 1) * size]

    def owned(self) -> List[Tensor]:
        """This rank's slices of the parameters."""
        return [self.own(parameter.data) for parameter in self.parameters]

    def complete(self, tensors: Iterable[Tensor]) -> None:
        """Fill the slices of the other replicas into tensors of which each rank has its own; a collective of the replicas."""
        pending = []
        for flat, own in ((tensor.view(-1), self.own(tensor)) for tensor in tensors):
            size = self._size(flat)  # of every slice in an all-gather
            padded = flat if len(flat) == size * self.count else flat.new_empty(size * self.count)
            mine = padded[self.index * size : (self.index + 1) * size]
            if padded is not flat:
                mine[: len(own)] = own
            pending.append((flat, padded, all_gather(padded, mine, group=self.replicas, async_op=True)))
        for flat, padded, work in pending:
            work.wait()
            if padded is not flat:
                flat.copy_(padded[: len(flat)])

    def whole(self, own: Tensor, shape: torch.Size) -> Tensor:
        """Each rank's slice -> a tensor of this shape with the slices of all; a collective of the replicas."""
        tensor = own.new_empty(shape)
        self.own(tensor).copy_(own)
        self.complete([tensor])
        return tensor

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """In this context, parameters and their gradients are the slices, in the memory of the whole."""
        held: List[Tensor] = [parameter.data for parameter in self.parameters]
        grads = [None if p.grad is None else p.grad.contiguous() for p in self.parameters]
        for parameter, data, grad in zip(self.parameters, held, grads):
            _set(parameter, self.own(data), None if grad is None else self.own(grad))
        try:
            yield
        finally:
            for parameter, data, grad in zip(self.parameters, held, grads):
                _set(parameter, data, grad)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """As narrowed, for an optimizer's step; then the parameters get the slices of the other replicas."""
        with self.narrowed():
            yield
        self.complete([parameter.data for parameter in self.parameters])

    def _size(self, whole: Tensor) -> int:
        return -(-whole.numel() // self.count)


def _set(parameter: nn.Parameter, data: Tensor, grad: Optional[Tensor]) -> None:
    parameter.grad = None  # torch checks that shapes agree
    parameter.data = data
    parameter.grad = grad
