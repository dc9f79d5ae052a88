"""Plain top-k routing (Shazeer et al., 2017; arXiv 1701.06538, without noise), with the options of later models.

The scores of a token are the softmax or the sigmoid of its logits. Its k experts have the highest scores, each score plus
the expert's selection bias; their weights are the scores, normalised to sum to 1 or raw, times a scale.

    Mixtral (arXiv 2401.04088)        k 2, softmax, normalised
    OLMoE (arXiv 2409.02060)          k 8, softmax, raw
    DeepSeek-V3 (arXiv 2412.19437)    k 8, sigmoid, normalised, scale 2.5, the best 4 of 8 groups, selection bias

With groups of experts, a group's score is the sum of its two best biased scores, and only experts of the `topk_groups` best
groups can be chosen (DeepSeek-V3, Section 2.1.2): on as many nodes, a token's experts are on few of them.
"""

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, require_top_k, sum_to_one
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing

SCORES = ("softmax", "sigmoid")
WEIGHTS = ("normalised", "raw")
BEST_OF_GROUP = 2  # scores that make a group's


def topk_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    top_k: int,
    score: str = "softmax",
    weights: str = "normalised",
    scale: float = 1.0,
    groups: int = 1,
    topk_groups: int = 1,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """The top_k experts for logits [S, E]; bias [E], if given, is added to the scores for the choice only.

    The balance loss uses the scores normalised over all experts, and counts all k choices.
    """
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()  # [S, E]
    selection = biased(scores, bias)
    if groups > topk_groups:
        selection = keep_best_groups(selection, groups, topk_groups)
    expert_index = selection.topk(top_k, -1).indices  # [S, k]
    weight = scores.gather(1, expert_index)
    if weights == "normalised":
        weight = sum_to_one(weight)
    probabilities = scores if score == "softmax" else sum_to_one(scores)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight * scale, padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, expert_index, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


def keep_best_groups(selection: Tensor, groups: int, topk_groups: int) -> Tensor:
    """selection [S, E] with -inf for experts outside the topk_groups best of `groups` consecutive groups of E / groups."""
    grouped = selection.view(len(selection), groups, selection.size(1) // groups)
    best = grouped.topk(min(BEST_OF_GROUP, grouped.size(-1)), -1).values.sum(-1)  # [S, groups]
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(topk_groups, -1).indices, True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)


@register_gate("topk")
class TopKGate(Gate):
    """The top-k gate; see the top of this file for its options.

    Raises ValueError for an option out of range: E must be a multiple of `groups`, and the topk_groups best groups must have
    k experts.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        top_k: int = 2,
        router_score: str = "softmax",
        router_weights: str = "normalised",
        router_scale: float = 1.0,
        router_groups: int = 1,
        router_topk_groups: Optional[int] = None,
        **balancing: Any,
    ):
        super().__init__(model_dim, num_experts, **balancing)
        self.top_k = require_top_k(top_k, num_experts)
        self.score = _require("router_score", router_score, SCORES)
        self.weights = _require("router_weights", router_weights, WEIGHTS)
        if not 0 < router_scale < float("inf"):
            raise ValueError(f"router_scale={router_scale} must be positive and finite; DeepSeek-V3 uses 2.5")
        self.scale = router_scale
        self.groups, self.topk_groups = _require_groups(router_groups, router_topk_groups, self.top_k, num_experts)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the scores, normalised and scaled as the flags say."""
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        weight = scores.gather(1, expert_index)
        weight = weight if skipped is None else weight.masked_fill(skipped, 0)
        return (sum_to_one(weight) if self.weights == "normalised" else weight) * self.scale

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See topk_routing."""
        return topk_routing(
            logits,
            padding_mask,
            self.top_k,
            self.score,
            self.weights,
            self.scale,
            self.groups,
            self.topk_groups,
            self.balance_scope,
            self.selection_bias,
        )


def _require(name: str, value: str, choices: Tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value} must be {' or '.join(choices)}")
    return value


def _require_groups(groups: int, topk_groups: Optional[int], top_k: int, num_experts: int) -> Tuple[int, int]:
    """(groups, topk_groups), all groups for None. Raises ValueError."""
    if groups < 1 or num_experts % groups:
        raise ValueError(f"router_groups={groups} must divide num_experts={num_experts}")
    kept = groups if topk_groups is None else topk_groups
    if not 1 <= kept <= groups:
        raise ValueError(f"router_topk_groups={kept} must lie between 1 and router_groups={groups}")
    if kept * (num_experts // groups) < top_k:
        raise ValueError(
            f"router_topk_groups={kept} leaves a token {kept * (num_experts // groups)} experts, fewer than top_k={top_k}"
        )
    return groups, kept
