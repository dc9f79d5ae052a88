"""Rows between ranks: asynchronous all-to-alls of chunks, so that one travels while another is computed.

A round trip is four autograd functions. For two chunks, forward issues

    depart     starts sending chunks 0 and 1
    arrive 0   waits for chunk 0; the experts follow; send_home 0 starts returning their outputs
    arrive 1   the same for chunk 1
    come_home  waits for both

and backward the mirror image, chunk 1 first, as autograd runs the function that was called last first. Between starting and
waiting, autograd holds an empty tensor, the ticket, in place of rows that have not arrived.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import ExpertGroup


class Transfer:
    """An all-to-all: the first send[0] rows go to rank 0 of the group, and so on; rows arrive in the order of the senders.

    In the backward pass, gradients travel the other way. Every rank of the group must start its transfers in the same order.
    """

    def __init__(self, send: Sequence[int], receive: Sequence[int], expert_group: ExpertGroup):
        self.send, self.receive, self.expert_group = list(send), list(receive), expert_group
        self._under_way: Optional[Tuple[Any, Tensor, Tensor]] = None  # the rows are kept until they have left

    def start(self, rows: Tensor, backward: bool = False) -> Tensor:
        """Start sending rows [sum(send), M]; backward: [sum(receive), M]. A ticket [0]."""
        send, receive = (self.receive, self.send) if backward else (self.send, self.receive)
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        with self.expert_group.measured(rows.device):
            work = dist.all_to_all_single(received, rows, receive, send, group=self.expert_group.group, async_op=True)
        self._under_way = work, rows, received
        return rows.new_empty(0)

    def finish(self) -> Tensor:
        """Wait for the rows that were started -> [sum(receive), M]; backward: [sum(send), M]."""
        assert self._under_way is not None
        (work, _, received), self._under_way = self._under_way, None
        with self.expert_group.measured(received.device):
            work.wait()
        return received


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfers: List[Transfer]) -> Tuple[Tensor, ...]:
        ctx.transfers = transfers
        return _start_all(rows, transfers)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> Tuple[Tensor, None]:
        return _join([transfer.finish() for transfer in ctx.transfers]), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return ctx.transfer.start(grad, backward=True), None


class _SendHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> Tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _ComeHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfers: List[Transfer], *tickets: Tensor) -> Tensor:
        ctx.transfers = transfers
        return _join([transfer.finish() for transfer in transfers])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        return (None, *_start_all(grad, ctx.transfers, backward=True))


def depart(rows: Tensor, transfers: List[Transfer]) -> Tuple[Tensor, ...]:
    """Start sending rows [N, M], the chunks one behind the other -> the ticket of each."""
    tickets: Tuple[Tensor, ...] = _Depart.apply(rows, transfers)
    return tickets


def arrive(ticket: Tensor, transfer: Transfer) -> Tensor:
    """Wait for the rows of a chunk that other ranks have sent -> [sum(transfer.receive), M]."""
    rows: Tensor = _Arrive.apply(ticket, transfer)
    return rows


def send_home(rows: Tensor, transfer: Transfer) -> Tensor:
    """Start returning rows [sum(transfer.send), M] -> a ticket."""
    ticket: Tensor = _SendHome.apply(rows, transfer)
    return ticket


def come_home(tickets: Sequence[Tensor], transfers: List[Transfer]) -> Tensor:
    """Wait for all rows that send_home has started -> [N, M], the chunks one behind the other."""
    rows: Tensor = _ComeHome.apply(transfers, *tickets)
    return rows


def _start_all(rows: Tensor, transfers: List[Transfer], backward: bool = False) -> Tuple[Tensor, ...]:
    """Start sending rows [N, M]; backward: the last chunk first, as it is the first to be computed."""
    parts = list(zip(transfers, rows.split([sum(each.receive if backward else each.send) for each in transfers])))
    tickets = [transfer.start(part, backward) for transfer, part in (reversed(parts) if backward else parts)]
    return tuple(reversed(tickets) if backward else tickets)


def _join(parts: List[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
