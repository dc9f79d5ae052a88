"""Routing in one pass by the fused kernels, for Switch and the SparseMixers; the gates' own functions are the reference."""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.estimators import NODES, Estimator
from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.kernels import choice, functions


def is_fused(logits: Tensor, balance_scope: Optional[BalanceScope]) -> bool:
    """Whether the kernels route these logits [S, E]: they sum the balance loss over this forward alone."""
    return balance_scope is None and logits.dtype == torch.float32 and choice.fused(logits.device, torch.bfloat16)


def fused_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    noise: Optional[Tensor],
    bias: Optional[Tensor],
    options: functions.RouterOptions,
) -> Routing:
    """The Routing of logits [S, E]; noise and bias as in ops.route."""
    index, weight, probabilities, balance, router_z = functions.route(logits, noise, bias, padding_mask, options)
    losses = {"balance": balance, "router_z": router_z}
    return Routing(index, weight, losses, probabilities=probabilities, padding_mask=padding_mask)


def draw_uniform(logits: Tensor, k: int) -> Tensor:
    """[S, k, E + 1] in [0, 1): for each draw, numbers that become Gumbel noise, and the estimator's coin."""
    return torch.rand(logits.size(0), k, logits.size(1) + 1, dtype=logits.dtype, device=logits.device)


def mixer_options(
    router: str, k: int, jitter_eps: float, estimator: Estimator, trains: bool, sampled: bool
) -> functions.RouterOptions:
    """Those of SparseMixer and SparseMixer-v2."""
    node = -1 if estimator.deterministic else NODES.index(estimator.node)
    at_argmax, gain = not estimator.first_order_argmax, estimator.gain if trains else 1.0
    return functions.RouterOptions(router, k, jitter_eps, node, at_argmax, sampled, gain)
