"""Dispatch when this rank holds all experts: sort, run, combine. Dropless unless the routing itself dropped tokens."""

from typing import Callable, Sequence, Union

from torch import Tensor

from fairseq_sparsemixer.moe.dispatch.combine import combine
from fairseq_sparsemixer.moe.dispatch.sorting import gather, order_pairs, sort_pairs
from fairseq_sparsemixer.moe.gates.routing import Routing

ExpertsFunction = Callable[[Tensor, Union[Sequence[int], Tensor]], Tensor]


def dispatch_locally(tokens: Tensor, routing: Routing, experts: ExpertsFunction, counts_on_device: bool = False) -> Tensor:
    """tokens [S, M] -> [S, M]: the sum over choices of combine_weight * expert(token), times output_scale.

    `experts` maps rows [N, M] grouped by expert, and the counts by expert, to [N, M]. With counts_on_device it gets
    N = S * k rows (at most the routing's max_routed), unrouted ones last, and counts as a tensor; no host
    synchronisation, unless tokens skip columns and max_routed is unknown.
    """
    k = routing.expert_index.size(1)
    counts: Union[Sequence[int], Tensor]
    if counts_on_device:
        pairs, counts = order_pairs(routing)
        if routing.skipped is not None and routing.max_routed is None:
            pairs = pairs[: int(counts.sum())]  # a synchronisation costs less than the E rows per token that might run
        pairs = pairs[: routing.max_routed]
    else:
        pairs, counts = sort_pairs(routing)
    outputs = experts(gather(tokens, pairs, k), counts)  # [N, M]
    return combine(outputs, routing, pairs, tokens.size(0))
