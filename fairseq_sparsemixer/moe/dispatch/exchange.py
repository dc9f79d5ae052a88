"""Rows between ranks: asynchronous all-to-alls of chunks, so that one travels while another is computed.

A round trip is four autograd functions. For two chunks, forward issues

    start_dispatch      starts sending chunks 0 and 1
    finish_dispatch 0   waits for chunk 0; the experts follow; start_return 0 starts returning their outputs
    finish_dispatch 1   the same for chunk 1
    finish_return       waits for both

and backward the mirror image, chunk 1 first, as autograd runs the function that was called last first. Between starting and
waiting, autograd holds an empty tensor, the ticket, in place of rows that have not arrived.
"""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.blocks import move_blocks, transposed
from fairseq_sparsemixer.moe.dispatch.route import Leg, Route
from fairseq_sparsemixer.moe.parallel import ExpertGroup


class Transfer:
    """Rows on their way between the ranks of a group: outward to the experts, or back.

    Outward, they leave and arrive as in one all-to-all: the first rows go to rank 0 of the group, and so on, and arrive in the
    order of the senders. Back is the reverse. Gradients travel the other way. Every rank of the group must start its
    transfers in the same order. A route in two steps is taken inside nodes at once and between nodes asynchronously.
    """

    def __init__(self, route: Route, expert_group: ExpertGroup, outward: bool):
        self.route, self.expert_group, self.outward = route, expert_group, outward
        self._under_way: Optional[Tuple[Any, Tensor, Tensor, bool]] = None  # the rows are kept until they have left

    def rows(self, backward: bool = False) -> int:
        """The number of rows that `start` takes."""
        return self.route.num_outward if self.outward != backward else self.route.num_returning

    def start(self, rows: Tensor, backward: bool = False) -> Tensor:
        """Start sending rows [N, M], N as `rows` says -> a ticket [0]."""
        outward, route = self.outward != backward, self.route
        with self.expert_group.measured(rows.device):
            if outward and route.inside is not None:
                rows = move_blocks(self._exchange(rows, route.inside, outward)[0], route.passing)
            received, sent, work = self._exchange(rows, route.between, outward, wait=False)
        self._under_way = work, sent, received, outward
        return rows.new_empty(0)

    def finish(self) -> Tensor:
        """Wait for the rows that were started -> [N', M]."""
        assert self._under_way is not None
        (work, _, received, outward), self._under_way = self._under_way, None
        with self.expert_group.measured(received.device):
            work.wait()
            if not outward and self.route.inside is not None:
                back = move_blocks(received, transposed(self.route.passing))
                received, *_ = self._exchange(back, self.route.inside, outward)
        return received

    @staticmethod
    def _exchange(rows: Tensor, leg: Leg, outward: bool, wait: bool = True) -> Tuple[Tensor, Tensor, Any]:
        """The rows received, those sent, and the work to wait for."""
        send, receive = (leg.send, leg.receive) if outward else (leg.receive, leg.send)
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, receive, send, group=leg.group, async_op=not wait)
        return received, rows, work


class _StartDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfers: List[Transfer]) -> Tuple[Tensor, ...]:
        ctx.transfers = transfers
        return _start_all(rows, transfers)

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> Tuple[Tensor, None]:
        return _join([transfer.finish() for transfer in ctx.transfers]), None


class _FinishDispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.finish()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        return ctx.transfer.start(grad, backward=True), None


class _StartReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    def backward(ctx: Any, ticket: Tensor) -> Tuple[Tensor, None]:
        return ctx.transfer.finish(), None


class _FinishReturn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, transfers: List[Transfer], *tickets: Tensor) -> Tensor:
        ctx.transfers = transfers
        return _join([transfer.finish() for transfer in transfers])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        return (None, *_start_all(grad, ctx.transfers, backward=True))


def start_dispatch(rows: Tensor, transfers: List[Transfer]) -> Tuple[Tensor, ...]:
    """Start sending rows [N, M], the chunks one behind the other -> the ticket of each."""
    tickets: Tuple[Tensor, ...] = _StartDispatch.apply(rows, transfers)
    return tickets


def finish_dispatch(ticket: Tensor, transfer: Transfer) -> Tensor:
    """Wait for the rows [N', M] of a chunk that other ranks have sent."""
    rows: Tensor = _FinishDispatch.apply(ticket, transfer)
    return rows


def start_return(rows: Tensor, transfer: Transfer) -> Tensor:
    """Start returning the outputs [N', M] of a chunk -> a ticket."""
    ticket: Tensor = _StartReturn.apply(rows, transfer)
    return ticket


def finish_return(tickets: Sequence[Tensor], transfers: List[Transfer]) -> Tensor:
    """Wait for all rows that start_return has sent -> [N, M], the chunks one behind the other."""
    rows: Tensor = _FinishReturn.apply(transfers, *tickets)
    return rows


def _start_all(rows: Tensor, transfers: List[Transfer], backward: bool = False) -> Tuple[Tensor, ...]:
    """Start sending rows [N, M]; backward: the last chunk first, as it is the first to be computed."""
    parts = list(zip(transfers, rows.split([transfer.rows(backward) for transfer in transfers])))
    tickets = [transfer.start(part, backward) for transfer, part in (reversed(parts) if backward else parts)]
    return tuple(reversed(tickets) if backward else tickets)


def _join(parts: List[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
