"""Expert capacity: how many tokens an expert accepts in training, and which ones overflow and are dropped.

C = ceil(capacity_factor * k * real tokens / E). An expert's queue is in GShard's order: the first choices of all tokens,
by position, then the second choices, and so on. For dropped tokens only the residual connection remains.
"""

import math
from dataclasses import replace
from typing import Optional, Union

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing

ROUNDING = 1e-9  # 1.1 * 50 is slightly above 55 in floating point, and must not round up to 56


def require_capacity_factor(capacity_factor: Optional[float]) -> Optional[float]:
    """Return the capacity factor, None for infinity. Raises ValueError unless it is positive."""
    if capacity_factor is None or capacity_factor == math.inf:
        return None
    if not capacity_factor > 0:
        raise ValueError(f"capacity_factor={capacity_factor} must be positive; 1.25 is usual, and inf drops nothing")
    return capacity_factor


def expert_capacity(num_tokens: Union[int, Tensor], num_experts: int, capacity_factor: float, top_k: int = 1) -> Tensor:
    """C for num_tokens tokens, padding not counted: a scalar int64, on the device of num_tokens if that is a tensor."""
    share = torch.as_tensor(num_tokens, dtype=torch.float64) * (capacity_factor * top_k / num_experts)
    return torch.ceil(share * (1 - ROUNDING)).long()


def most_routed(num_choices: int, num_experts: int, capacity_factor: float, num_columns: int) -> int:
    """E * C for num_choices choices without padding: an upper bound on the choices that run, known on the host.

    num_columns: the number of entries of expert_index, which caps the bound.
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
    """The same routing with choices beyond an expert's capacity marked as dropped and given weight zero."""
    dropped = _dropped(routing, capacity_factor)  # [S, k]
    return replace(
        routing,
        combine_weight=routing.combine_weight.masked_fill(dropped, 0),
        dropped=dropped,
        max_routed=most_routed(dropped.numel(), routing.num_experts, capacity_factor, dropped.numel()),
    )
