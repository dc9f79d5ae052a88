"""The base class of all gates: it owns the projection to logits; subclasses implement `decide`."""

import math
from dataclasses import replace
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.bias import SelectionBias
from fairseq_sparsemixer.moe.gates.capacity import limit_capacity, require_capacity_factor, require_policy
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.kernels import choice, functions


class Gate(nn.Module):
    """Projects tokens [S, M] of any precision to logits [S, E] in float32, and routes them.

    A router is a subclass with `decide`. Its constructor takes `**balancing` if it supports all options below, or names
    the ones it supports; flags for the others are refused before training.
    `capacity_factor`: in training, an expert takes at most this multiple of its fair share of tokens and drops the rest;
    None and infinity drop nothing. `eval_capacity_factor`: the same at inference; a token's routing then depends on others,
    and the gate is not causal. `capacity_policy`: which choices are dropped (see capacity.py).
    `bias_update_rate`: the step of the selection bias (see bias.py); 0 for none.
    `router_bias`: the projection has a learned bias, initialised to zero.
    Raises ValueError for fewer than one expert, or an option out of range.
    """

    router: ClassVar[str]  # its name, which register_gate sets
    top_k = 1  # experts per token; an option of gates with a variable number
    causal = True  # at inference, a token's routing depends on no other token, as autoregressive decoders require
    has_defaults = False  # whether experts that do not run contribute to the output, too (Routing.default)
    wants_token_ids = False  # whether models should pass token ids to the gate
    balance_scope: Optional[BalanceScope] = None  # over which tokens the balance loss is computed; None: one forward's

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        capacity_factor: Optional[float] = None,
        bias_update_rate: float = 0.0,
        router_bias: bool = False,
        capacity_policy: str = "position",
        eval_capacity_factor: Optional[float] = None,
    ):
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts} must be at least 1")
        self.model_dim = model_dim
        self.num_experts = num_experts
        self.capacity_factor = require_capacity_factor(capacity_factor)
        self.eval_capacity_factor = require_capacity_factor(eval_capacity_factor, "eval_capacity_factor")
        if self.eval_capacity_factor is not None:
            self.causal = False
        self.capacity_policy = require_policy(capacity_policy)
        self.projection = nn.Linear(model_dim, num_experts, bias=router_bias)
        if router_bias:
            nn.init.zeros_(self.projection.bias)  # no expert is preferred before training
        self.balancer = SelectionBias(num_experts, bias_update_rate) if bias_update_rate else None

    @property
    def frozen(self) -> bool:
        """Whether none of the gate's parameters is trained; its auxiliary losses then have no gradient."""
        parameters = list(self.parameters())
        return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)

    @property
    def experts_per_token(self) -> float:
        """The mean number of experts per token at inference."""
        return self.top_k

    @property
    def current_capacity_factor(self) -> Optional[float]:
        """The capacity factor of the gate's mode, training or evaluation; None drops nothing."""
        return self.capacity_factor if self.training else self.eval_capacity_factor

    @property
    def selection_bias(self) -> Optional[Tensor]:
        """[E], added to the logits for selection but not for the combine weights; None if there is none."""
        return None if self.balancer is None else self.balancer.bias

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens [S, M] -> logits [S, E] in float32 (or float64): routing in half precision is unstable."""
        return project(tokens, self.projection.weight, self.projection.bias)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """logits [S, E], padding_mask [S] (True = padding) -> Routing, before any capacity."""
        raise NotImplementedError

    def route(self, logits: Tensor, padding_mask: Optional[Tensor] = None, **inputs: Any) -> Routing:
        """logits [S, E], padding_mask [S] (True = padding), and other arguments of this gate's `decide` -> Routing."""
        routing = self.decide(logits, padding_mask, **inputs)
        if self.current_capacity_factor is not None:
            routing = self.limit(routing)
        if self.training and self.balancer is not None:
            routing = replace(routing, combine_weight=self.balancer.watch_load(routing))
        return routing

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """The weights [S, K] that this gate gives to experts [S, K] chosen by others, without noise, for logits [S, E].

        skipped [S, K], True where a column is not a choice: its weight is not used. For --moe-replay.
        """
        return logits.softmax(-1).gather(1, expert_index)

    def limit(self, routing: Routing) -> Routing:
        """The routing with choices beyond the capacity dropped."""
        assert self.current_capacity_factor is not None
        return limit_capacity(routing, self.current_capacity_factor, self.capacity_policy)

    def forward(self, tokens: Tensor, padding_mask: Optional[Tensor] = None, token_ids: Optional[Tensor] = None) -> Routing:
        """tokens [S, M], padding_mask [S] (True = padding), token_ids [S] if the model knows them -> Routing."""
        plain = type(self).logits is Gate.logits  # a subclass may compute them in another way
        if plain and tokens.dtype != torch.float64 and choice.fused(tokens.device, tokens.dtype):
            logits, passed = functions.project(tokens, self.projection.weight)
            bias = self.projection.bias
            routing = self.route(logits if bias is None else logits + bias.to(logits.dtype), padding_mask)
            return replace(routing, tokens=passed)
        return self.route(self.logits(tokens), padding_mask)


def project(tokens: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """tokens [S, M], weight [E, M], bias [E] -> [S, E] in at least float32, regardless of autocast."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def biased(logits: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The logits, or scores, [S, E] used for selection: detached, plus the selection bias [E]."""
    return logits.detach() if bias is None else logits.detach() + bias.to(logits.dtype)


def require_jitter(jitter_eps: float, most: float = math.inf) -> float:
    """Return jitter_eps. Raises ValueError unless it is between 0 and `most`."""
    if not 0 <= jitter_eps <= most:
        bounds = "be at least 0" if most == math.inf else f"lie between 0 and {most:g}"
        raise ValueError(f"jitter_eps={jitter_eps} must {bounds}; the papers use 0.1")
    return jitter_eps


def require_probability(option: str, probability: float, at_zero: str) -> float:
    """Return the probability. Raises ValueError, with the option's name and what 0 does, unless it is in [0, 1)."""
    if not 0 <= probability < 1:
        raise ValueError(f"{option}={probability} must be at least 0 and less than 1; 0 {at_zero}")
    return probability


def require_top_k(top_k: int, num_experts: int) -> int:
    """Return top_k. Raises ValueError unless it is between 1 and num_experts."""
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k={top_k} must lie between 1 and num_experts={num_experts}")
    return top_k


def hide_padding(weight: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """weight [S, k], zero and without gradient where padding_mask [S] is True."""
    return weight if padding_mask is None else weight.masked_fill(padding_mask.unsqueeze(-1), 0)


def sum_to_one(weight: Tensor) -> Tensor:
    """weight [S, k] divided by its row sums; rows of zeros stay zero."""
    return weight / weight.sum(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
