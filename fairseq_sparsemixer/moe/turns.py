"""Lets ranks that share experts run the layers in different orders and numbers, as in generation.

The forward of a layer with experts sharded over ranks is a collective. Before each, the ranks agree on the layer to run
next: the first, in module order, of those that they wait for. Ranks that wait for a later one, or are done, join it without
tokens. A rank that falls behind catches up in this way, until all run the same layers again. Nothing but inference is supported,
because a backward needs the same forwards on every rank.
"""

from contextlib import contextmanager
from typing import Any, Iterator, List, Sequence

import torch
from torch import distributed as dist


class Turns:
    """The agreement of an expert group on the next of `layers`, MoELayers in the same order on every rank."""

    def __init__(self, layers: Sequence[Any]):
        self.layers: List[Any] = list(layers)
        self.places = {layer: place for place, layer in enumerate(self.layers)}
        self.expert_group = self.layers[0].expert_group
        self.device = next(self.layers[0].experts.parameters()).device

    def wait_for(self, layer: Any) -> None:
        """Return when it is this layer's turn; until then, join the layers of other ranks."""
        self._join_until(self.places[layer])

    def finish(self) -> None:
        """Join the layers of other ranks until all ranks have called this."""
        self._join_until(len(self.layers))

    def _join_until(self, place: int) -> None:
        while True:
            next_place = torch.tensor(place, device=self.device)
            dist.all_reduce(next_place, op=dist.ReduceOp.MIN, group=self.expert_group.group)
            chosen = int(next_place)
            if chosen == place:
                return
            self.layers[chosen].join()


@contextmanager
def taking_turns(layers: Sequence[Any]) -> Iterator[None]:
    """In this context, MoELayers with sharded experts may run in any order and number on each rank of their group.

    Every rank must enter and leave it; it ends when all ranks have left. Layers with all experts here are left alone.
    """
    sharded = [layer for layer in layers if layer.expert_group is not None]
    if not sharded:
        yield
        return
    turns = Turns(sharded)
    for layer in sharded:
        layer.turns = turns
    try:
        yield
        turns.finish()  # not after an error: this rank ends, and so will the others
    finally:
        for layer in sharded:
            layer.turns = None


@contextmanager
def balancing_alone(layers: Sequence[Any]) -> Iterator[None]:
    """In this context, a balance loss is over its forward's tokens, whatever the scope: nothing learns from it."""
    scopes = [layer.gate.balance_scope for layer in layers]
    for layer in layers:
        layer.gate.balance_scope = None
    try:
        yield
    finally:
        for layer, scope in zip(layers, scopes):
            layer.gate.balance_scope = scope
