"""GShard (Lepikhin et al., 2020; arXiv 2006.16668, Algorithm 1), with the semantics of fairscale's Top2Gate.

The first expert is the arg-max of pi = softmax(logits); the second is sampled from the others in proportion to pi (at
inference: the second most probable). Choices beyond an expert's capacity are dropped, second choices before first ones,
and pi is renormalised over the remaining choices. The balance loss counts first choices only.

Two options of lingvo and of fairseq's branch moe. The second expert's policy, in training:

    sampling    sampled in proportion to pi
    all         the second most probable
    random      the second most probable, kept with probability min(1, 2 w), w its weight: else the token has one expert

and `normalise_before_dropping`: the weights are pi normalised over both choices, and not renormalised over those that remain.
For `random`, w is the normalised weight then (Algorithm 1 of the paper), else pi.
"""

from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing

SECOND_EXPERT = ("sampling", "all", "random")


def gshard_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor] = None,
    gumbel: Optional[Tensor] = None,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
    coin: Optional[Tensor] = None,
    normalise_first: bool = False,
) -> Routing:
    """Two experts per token for logits [S, E], E > 1; gumbel [S, E] samples the second one, None takes the second best.

    bias [E], if given, is used for the two choices only. coin [S], uniform in [0, 1), skips the second expert where it is not
    below twice its weight, which is normalised if normalise_first. No capacity is applied yet.
    """
    probabilities = logits.softmax(-1)  # [S, E]
    selection = biased(logits, bias)
    first = selection.argmax(-1, keepdim=True)  # [S, 1]
    others = (selection if gumbel is None else selection + gumbel).scatter(1, first, float("-inf"))
    expert_index = torch.cat([first, others.argmax(-1, keepdim=True)], 1)  # [S, 2]
    weight = probabilities.gather(1, expert_index)
    if normalise_first:
        weight = normalise(weight)
    skipped = None if coin is None else skip_second(weight, coin)
    if skipped is not None:
        weight = weight.masked_fill(skipped, 0)
    if not normalise_first:
        weight = normalise(weight)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, first, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
        skipped=skipped,
        max_routed=None if skipped is None else skipped.numel(),  # known on the host
    )


@torch.no_grad()
def skip_second(weight: Tensor, coin: Tensor) -> Tensor:
    """[S, 2] bool: True for the second expert where coin [S] is not below twice its weight, of weight [S, 2]."""
    return torch.stack([torch.zeros_like(coin, dtype=torch.bool), coin >= 2 * weight[:, 1]], 1)


def normalise(weight: Tensor) -> Tensor:
    """weight [S, k] divided by its row sums; rows of zeros stay zero."""
    return weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).eps)


@register_gate("gshard")
class GShardGate(Gate):
    """GShard's gate. Its capacity factor is 1 by default, fairscale's C = 2 S / E; infinity makes it dropless.

    See the top of this file for its options. Raises ValueError for fewer than two experts, and for an unknown policy.
    """

    top_k = 2

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        capacity_factor: Optional[float] = 1.0,
        bias_update_rate: float = 0.0,
        capacity_policy: str = "position",
        eval_capacity_factor: Optional[float] = None,
        second_expert_policy: str = "sampling",
        normalise_before_dropping: bool = False,
    ):
        super().__init__(
            model_dim,
            num_experts,
            capacity_factor,
            bias_update_rate,
            capacity_policy=capacity_policy,
            eval_capacity_factor=eval_capacity_factor,
        )
        if num_experts < 2:
            raise ValueError(f"router=gshard gives each token two experts; num_experts={num_experts} must be at least 2")
        if second_expert_policy not in SECOND_EXPERT:
            known = ", ".join(SECOND_EXPERT)
            raise ValueError(f"second_expert_policy={second_expert_policy} is unknown; choose from {known}")
        self.second_expert_policy = second_expert_policy
        self.normalise_before_dropping = normalise_before_dropping

    def draw_noise(self, logits: Tensor) -> Optional[Tensor]:
        """The noise of one forward pass: Gumbel [S, E] for sampling, uniform [S] for random; None for all and at inference."""
        if not self.training or self.second_expert_policy == "all":
            return None
        if self.second_expert_policy == "random":
            return torch.rand_like(logits[:, 0])
        return -torch.empty_like(logits).exponential_().log()

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: normalised."""
        weight = super().weigh(logits, expert_index)
        return normalise(weight if skipped is None else weight.masked_fill(skipped, 0))

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See gshard_routing."""
        noise = self.draw_noise(logits)
        gumbel, coin = (None, noise) if self.second_expert_policy == "random" else (noise, None)
        return gshard_routing(
            logits, padding_mask, gumbel, self.balance_scope, self.selection_bias, coin, self.normalise_before_dropping
        )

    def limit(self, routing: Routing) -> Routing:
        """See Gate.limit; the weights of the remaining choices are renormalised to sum to 1, unless they were before."""
        limited = super().limit(routing)
        if self.normalise_before_dropping:
            return limited
        return replace(limited, combine_weight=normalise(limited.combine_weight))
