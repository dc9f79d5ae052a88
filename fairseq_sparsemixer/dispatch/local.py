"""All experts are here: sort, run, add back. Dropless unless the routing itself dropped something."""

from typing import Callable, Sequence

from torch import Tensor

from fairseq_sparsemixer.dispatch.sorting import gather, sort_pairs, spread
from fairseq_sparsemixer.gates.routing import Routing

ExpertsFunction = Callable[[Tensor, Sequence[int]], Tensor]


def dispatch_locally(tokens: Tensor, routing: Routing, experts: ExpertsFunction) -> Tensor:
    """tokens [S, M] through their experts: sum over choices of combine_weight * expert(token), [S, M].

    `experts` maps rows [N, M] grouped by expert, and the counts by expert, to [N, M].
    """
    k = routing.expert_index.size(1)
    pairs, counts = sort_pairs(routing)
    outputs = experts(gather(tokens, pairs, k), counts)  # [N, M]
    weight = routing.combine_weight.reshape(-1).index_select(0, pairs)  # [N]
    return spread(outputs * weight.unsqueeze(-1).to(outputs.dtype), pairs, tokens.size(0), k)
