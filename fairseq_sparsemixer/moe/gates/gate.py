"""The base of every gate: it owns the projection to logits, and leaves the decision to `decide`."""

import math
from dataclasses import replace
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sparsemixer.moe.gates.bias import SelectionBias
from fairseq_sparsemixer.moe.gates.capacity import limit_capacity, require_capacity_factor
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.parallel import RankGroup


class Gate(nn.Module):
    """Projects tokens [S, M] to logits [S, E] in float32, whatever the tokens' precision, and routes them.

    A router is a subclass with `decide`. Its constructor takes `**balancing` when it can be combined with all options
    below, or those it can honour by name; a flag for any other is refused before training.
    `capacity_factor`: in training, an expert takes that many times its fair share of tokens and drops the rest; None and
    infinity drop nothing. `bias_update_rate`: the step of the selection bias (see bias.py), 0 for none. `router_bias`: the
    projection has a learned bias, which starts at zero.
    Raises ValueError for fewer than one expert, or an option out of range.
    """

    router: ClassVar[str]  # its name, which register_gate sets
    top_k = 1  # experts a token; a gate that can choose more takes it as an option
    causal = True  # at inference, a token's routing depends on no other token: fit for autoregressive decoders
    wants_token_ids = False  # whether models should hand the ids of the tokens down to it
    _balance_group: Optional[RankGroup] = None

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        capacity_factor: Optional[float] = None,
        bias_update_rate: float = 0.0,
        router_bias: bool = False,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        self.model_dim = model_dim
        self.num_experts = num_experts
        self.capacity_factor = require_capacity_factor(capacity_factor)
        self.projection = nn.Linear(model_dim, num_experts, bias=router_bias)
        if router_bias:
            nn.init.zeros_(self.projection.bias)  # no expert is preferred before training
        self.balancer = SelectionBias(num_experts, bias_update_rate) if bias_update_rate else None

    @property
    def balance_group(self) -> Optional[RankGroup]:
        """The ranks whose tokens the balance loss is about, set as a process group of torch's; None: this rank's own."""
        return self._balance_group

    @balance_group.setter
    def balance_group(self, group: Any) -> None:
        self._balance_group = group if group is None or isinstance(group, RankGroup) else RankGroup(group)

    @property
    def experts_per_token(self) -> float:
        """How many experts run for a token at inference, on average."""
        return self.top_k

    @property
    def selection_bias(self) -> Optional[Tensor]:
        """[E], added to the logits by which experts are selected, never to those that weigh them; None for none."""
        return None if self.balancer is None else self.balancer.bias

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [S, M] -> logits [S, E] float32 (float64 stays so): routing in half precision is unstable."""
        return project(tokens, self.projection.weight, self.projection.bias)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """logits [S, E], padding_mask [S] (True = padding) -> Routing, before any capacity."""
        raise NotImplementedError

    def route(self, logits: Tensor, padding_mask: Optional[Tensor] = None, **inputs: Any) -> Routing:
        """logits [S, E], padding_mask [S] (True = padding), and what else this gate's decide takes -> Routing."""
        routing = self.decide(logits, padding_mask, **inputs)
        if self.training and self.capacity_factor is not None:
            routing = self.limit(routing)
        if self.training and self.balancer is not None:
            routing = replace(routing, combine_weight=self.balancer.watch(routing))
        return routing

    def limit(self, routing: Routing) -> Routing:
        """The routing with what exceeds the capacity dropped."""
        assert self.capacity_factor is not None
        return limit_capacity(routing, self.capacity_factor)

    def forward(self, tokens: Tensor, padding_mask: Optional[Tensor] = None, token_ids: Optional[Tensor] = None) -> Routing:
        """tokens [S, M], padding_mask [S] (True = padding), token_ids [S] where the model knows them -> Routing."""
        return self.route(self.logits(tokens), padding_mask)


def project(tokens: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """tokens [S, M], weight [E, M], bias [E] -> [S, E] in float32 at least, whatever autocast says."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def biased(logits: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The logits [S, E] to select by: detached, with the selection bias [E]."""
    return logits.detach() if bias is None else logits.detach() + bias.to(logits.dtype)


def require_jitter(jitter_eps: float, most: float = math.inf) -> float:
    """The jitter itself. Raises ValueError unless it lies between 0 and `most`."""
    if not 0 <= jitter_eps <= most:
        bounds = "be at least 0" if most == math.inf else f"lie between 0 and {most:g}"
        raise ValueError(f"jitter_eps={jitter_eps} must {bounds}; the papers use 0.1")
    return jitter_eps


def require_top_k(top_k: int, num_experts: int) -> int:
    """The number of experts a token itself. Raises ValueError when there are not that many."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
    return top_k


def hide_padding(weight: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """weight [S, k] with zeros, and no gradient, where padding_mask [S] is True."""
    return weight if padding_mask is None else weight.masked_fill(padding_mask.unsqueeze(-1), 0)
