"""The base of every gate: it owns the projection to logits, and leaves the decision to `route`."""

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sparsemixer.gates.routing import Routing


class Gate(nn.Module):
    """Projects tokens [S, M] to logits [S, E] in float32, whatever the tokens' precision, and routes them.

    A router is a subclass with `route`. Raises ValueError for fewer than one expert.
    """

    top_k = 1  # experts a token; a gate that can choose more takes it as an option
    balance_group: Any = None  # the ranks whose tokens the balance loss is about; None: this rank's own

    def __init__(self, model_dim: int, num_experts: int):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"--num-experts {num_experts} must be at least 1")
        self.model_dim = model_dim
        self.num_experts = num_experts
        self.projection = nn.Linear(model_dim, num_experts, bias=False)

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [S, M] -> logits [S, E] float32 (float64 stays so): routing in half precision is unstable."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.to(dtype), self.projection.weight.to(dtype))

    def route(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """logits [S, E], padding_mask [S] (True = padding) -> Routing."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """tokens [S, M], padding_mask [S] (True = padding) -> Routing."""
        return self.route(self.logits(tokens), padding_mask)


def require_jitter(jitter_eps: float) -> float:
    """The jitter itself. Raises ValueError when it is negative."""
    if jitter_eps < 0:
        raise ValueError(f"--jitter-eps {jitter_eps} must not be negative; the papers use 0.1, and 0 switches it off")
    return jitter_eps


def require_top_k(top_k: int, num_experts: int) -> int:
    """The number of experts a token itself. Raises ValueError when there are not that many."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"--moe-top-k {top_k} must lie between 1 and --num-experts {num_experts}")
    return top_k


def hide_padding(weight: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """weight [S, k] with zeros, and no gradient, where padding_mask [S] is True."""
    return weight if padding_mask is None else weight.masked_fill(padding_mask.unsqueeze(-1), 0)
