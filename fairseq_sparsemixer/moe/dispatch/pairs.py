"""A routing's pairs sorted by expert, on the device: what dispatchers need of them, by PyTorch or by the fused kernels."""

from typing import Union

from torch import Tensor

from fairseq_sparsemixer.moe.dispatch.combine import combine
from fairseq_sparsemixer.moe.dispatch.fused import FusedPairs
from fairseq_sparsemixer.moe.dispatch.sorting import gather, order_pairs
from fairseq_sparsemixer.moe.gates.routing import Routing


class Pairs:
    """counts [E] int64: the routed pairs of each expert, on the device."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self.pairs, self.counts = order_pairs(routing)

    def reorder(self, order: Tensor) -> None:
        """Put the routed pairs into this order [N]: row n becomes the row that order[n] was."""
        self.pairs = self.pairs.index_select(0, order)

    def gather(self, tokens: Tensor, rows: int) -> Tensor:
        """tokens [S, M] -> [N, M], the tokens of the first `rows` pairs."""
        return gather(tokens, self.pairs[:rows], self.routing.expert_index.size(1))

    def combine(self, rows: Tensor) -> Tensor:
        """rows [N, M], the experts' outputs -> [S, M]; see combine.combine."""
        return combine(rows, self.routing, self.pairs[: rows.size(0)], self.routing.expert_index.size(0))


def sorted_pairs(routing: Routing, fused: bool) -> Union[Pairs, FusedPairs]:
    """The pairs of the routing; fused: by the kernels."""
    return FusedPairs(routing) if fused else Pairs(routing)
