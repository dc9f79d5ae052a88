"""Expert capacity: how many tokens an expert takes in training, and which are dropped beyond it.

C = ceil(capacity_factor * k * real tokens / E). An expert is served in the order of GShard: the first choices of all
tokens, by position, then the second ones, and so on. Dropped tokens keep the residual connection alone.
"""

import math
from dataclasses import replace
from typing import Optional, Union

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing

ROUNDING = 1e-9  # 1.1 * 50 is a little over 55 in floating point, and must not make room for one more


def require_capacity_factor(capacity_factor: Optional[float]) -> Optional[float]:
    """The capacity factor itself, None for infinity. Raises ValueError unless it is positive."""
    if capacity_factor is None or capacity_factor == math.inf:
        return None
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive; 1.25 is usual, and inf drops nothing")
    return capacity_factor


def expert_capacity(num_tokens: Union[int, Tensor], num_experts: int, capacity_factor: float, top_k: int = 1) -> Tensor:
    """C for num_tokens tokens that are not padding: a scalar int64, on their device when num_tokens is a tensor."""
    share = torch.as_tensor(num_tokens, dtype=torch.float64) * (capacity_factor * top_k / num_experts)
    return torch.ceil(share * (1 - ROUNDING)).long()


def most_routed(num_choices: int, num_experts: int, capacity_factor: float, num_columns: int) -> int:
    """E * C for num_choices choices, were none of them padding: an upper bound on those that run, known on the host.

    num_columns: all entries of the expert_index, which the bound does not exceed.
    """
    per_expert = math.ceil(num_choices * capacity_factor / num_experts * (1 - ROUNDING))
    return min(num_experts * per_expert, num_columns)


@torch.no_grad()
def _dropped(routing: Routing, capacity_factor: float) -> Tensor:
    top_k = routing.expert_index.size(1)
    capacity = expert_capacity(routing.num_real_tokens(), routing.num_experts, capacity_factor, top_k)
    dropped = routing.queue_positions() >= capacity
    unrouted = routing.unrouted()
    return dropped if unrouted is None else dropped & ~unrouted


def limit_capacity(routing: Routing, capacity_factor: float) -> Routing:
    """The same routing with the choices beyond each expert's capacity marked as dropped, at weight zero."""
    dropped = _dropped(routing, capacity_factor)  # [S, k]
    return replace(
        routing,
        combine_weight=routing.combine_weight.masked_fill(dropped, 0),
        dropped=dropped,
        max_routed=most_routed(dropped.numel(), routing.num_experts, capacity_factor, dropped.numel()),
    )
