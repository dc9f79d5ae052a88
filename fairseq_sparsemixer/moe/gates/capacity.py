"""Expert capacity: how many tokens an expert accepts, and which ones overflow and are dropped.

C = ceil(capacity_factor * k * real tokens / E). The policy orders an expert's queue, of which the first C choices run:

    position      GShard's order: the first choices of all tokens, by position, then the second choices, and so on
    probability   descending combine weight, whatever the choice
    batch         the first choices of all tokens, by descending largest probability of the token, then the second choices:
                  batch-prioritised routing (Riquelme et al., 2021; arXiv 2106.05974, Section 4), also in fairseq's branch moe

Ties are in GShard's order. For dropped tokens only the residual connection remains.
"""

import math
from dataclasses import replace
from typing import Optional, Union

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing

POLICIES = ("position", "probability", "batch")
ROUNDING = 1e-9  # 1.1 * 50 is slightly above 55 in floating point, and must not round up to 56


def require_capacity_factor(capacity_factor: Optional[float], name: str = "capacity_factor") -> Optional[float]:
    """Return the capacity factor, None for infinity. Raises ValueError, with the option's name, unless it is positive."""
    if capacity_factor is None or capacity_factor == math.inf:
        return None
    if not capacity_factor > 0:
        raise ValueError(f"{name}={capacity_factor} must be positive; 1.25 is usual, and inf drops nothing")
    return capacity_factor


def require_policy(capacity_policy: str) -> str:
    """Return the policy. Raises ValueError if it is unknown."""
    if capacity_policy not in POLICIES:
        raise ValueError(f"capacity_policy={capacity_policy} is unknown; choose from {', '.join(POLICIES)}")
    return capacity_policy


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
def arrival_order(routing: Routing, policy: str) -> Optional[Tensor]:
    """[k * S]: the order in which choices enter the queues, as numbers j * S + s; None for GShard's."""
    if policy == "position":
        return None
    if policy == "probability":
        return routing.combine_weight.detach().t().reshape(-1).argsort(descending=True, stable=True)
    tokens = routing.probabilities.amax(-1).argsort(descending=True, stable=True)  # [S]
    start = torch.arange(routing.expert_index.size(1), device=tokens.device).unsqueeze(-1) * len(tokens)
    return (start + tokens).view(-1)


@torch.no_grad()
def _dropped(routing: Routing, capacity_factor: float, policy: str) -> Tensor:
    top_k = routing.expert_index.size(1)
    capacity = expert_capacity(routing.num_real_tokens(), routing.num_experts, capacity_factor, top_k)
    dropped = routing.queue_positions(arrival_order(routing, policy)) >= capacity
    unrouted = routing.unrouted()
    return dropped if unrouted is None else dropped & ~unrouted


def limit_capacity(routing: Routing, capacity_factor: float, policy: str = "position") -> Routing:
    """The same routing with choices beyond an expert's capacity marked as dropped and given weight zero."""
    dropped = _dropped(routing, capacity_factor, policy)  # [S, k]
    return replace(
        routing,
        combine_weight=routing.combine_weight.masked_fill(dropped, 0),
        dropped=dropped,
        max_routed=most_routed(dropped.numel(), routing.num_experts, capacity_factor, dropped.numel()),
    )
