"""Reads the choices of a Routing for a trace, and replaces them by those of a trace.

S tokens of a batch are T positions times B columns, as in fairseq's [T, B, M]; a column is a sentence. k choices; K columns
of a trace, the most experts of any of its tokens.
"""

from dataclasses import replace
from typing import Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import hide_padding
from fairseq_sparsemixer.moe.gates.routing import Routing


class Choices(NamedTuple):
    """The choices of N tokens, padding left out, in order of column and position; on the CPU.

    column, position [N]; token_id [N], None if unknown; expert_index, weight, ran [N, k]: ran is False where no expert ran.
    """

    column: Tensor
    position: Tensor
    token_id: Optional[Tensor]
    expert_index: Tensor
    weight: Tensor
    ran: Tensor


class Routes(NamedTuple):
    """Choices to use instead of a gate's.

    expert_index [S, K] int64. weight [S, K]; None: the gate's for these experts. skipped [S, K] bool, True where a column is
    not a choice; None if every column is. known [S] bool, False for tokens that keep the gate's choice; None: all are known.
    """

    expert_index: Tensor
    weight: Optional[Tensor]
    skipped: Optional[Tensor] = None
    known: Optional[Tensor] = None


def real_places(padding_mask: Optional[Tensor], shape: Sequence[int], device: torch.device) -> Tensor:
    """[T, B] bool, False at padding, for padding_mask [S] and shape (T, B)."""
    if padding_mask is None:
        return torch.ones(*shape, dtype=torch.bool, device=device)
    return ~padding_mask.view(*shape)


@torch.no_grad()
def read_choices(routing: Routing, shape: Sequence[int], token_ids: Optional[Tensor] = None) -> Choices:
    """The choices of a routing of shape (T, B), token_ids [T, B]. Waits for the device."""
    real = real_places(routing.padding_mask, shape, routing.expert_index.device).t()  # [B, T]
    column, place = real.nonzero(as_tuple=True)
    token = place * shape[1] + column
    chosen = routing.expert_index.size(1) if routing.num_chosen is None else routing.num_chosen
    index = routing.expert_index[token, :chosen]
    unrouted = routing.unrouted()
    ran = torch.ones_like(index, dtype=torch.bool) if unrouted is None else ~unrouted[token, :chosen]
    return Choices(
        column=column.cpu(),
        position=(real.cumsum(1) - 1)[column, place].cpu(),
        token_id=None if token_ids is None else token_ids.reshape(-1)[token].cpu(),
        expert_index=index.cpu(),
        weight=routing.combine_weight[token, :chosen].cpu(),
        ran=ran.cpu(),
    )


def follow_routes(routing: Routing, routes: Routes, weigh: Callable[[Tensor, Optional[Tensor]], Tensor]) -> Routing:
    """The routing with the choices of `routes`; weigh(expert_index, skipped) gives weights [S, K] where routes have none.

    The auxiliary losses and the probabilities remain the gate's own. Nothing is dropped.
    """
    skipped = routes.skipped
    weight = routes.weight
    if weight is None:
        weight = weigh(routes.expert_index, skipped)
    weight = hide_padding(weight.to(routing.combine_weight.dtype), routing.padding_mask)
    if skipped is not None:
        weight = weight.masked_fill(skipped, 0)
    default = routing.default
    if default is not None:
        everything = default.weight.scatter_add(1, routing.expert_index, routing.combine_weight)  # [S, E], the probabilities
        runs = torch.zeros_like(everything, dtype=torch.bool)
        runs = runs.scatter(1, routes.expert_index, True) if skipped is None else _scatter(runs, routes.expert_index, ~skipped)
        default = default._replace(weight=everything.masked_fill(runs, 0))
    followed = replace(
        routing,
        expert_index=routes.expert_index,
        combine_weight=weight,
        skipped=skipped,
        dropped=None,
        num_chosen=None,
        max_routed=None,
        amount=None,
        default=default,
    )
    return followed if routes.known is None else _merged(routes.known.unsqueeze(-1), followed, routing)


def _scatter(runs: Tensor, expert_index: Tensor, ran: Tensor) -> Tensor:
    """runs [S, E] bool with True at the experts [S, K] that ran; several columns may name one expert."""
    return runs.to(torch.int32).scatter_add(1, expert_index, ran.to(torch.int32)) > 0


def _merged(known: Tensor, followed: Routing, own: Routing) -> Routing:
    """`followed` where known [S, 1], `own` elsewhere, in as many columns as the wider of both has."""
    width = max(followed.expert_index.size(1), own.expert_index.size(1))

    def wide(value: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(value, (0, width - value.size(1)), value=fill)

    def lacks(routing: Routing) -> Tensor:
        masks = [mask for mask in (routing.dropped, routing.skipped) if mask is not None]
        none = torch.zeros_like(routing.expert_index, dtype=torch.bool)
        return wide(torch.stack([none, *masks]).any(0), True)

    default = followed.default
    if default is not None and own.default is not None:
        default = default._replace(weight=torch.where(known, default.weight, own.default.weight))
    return replace(
        followed,
        expert_index=torch.where(known, wide(followed.expert_index, 0), wide(own.expert_index, 0)),
        combine_weight=torch.where(known, wide(followed.combine_weight, 0), wide(own.combine_weight, 0)),
        skipped=torch.where(known, lacks(followed), lacks(own)),
        default=default,
    )
