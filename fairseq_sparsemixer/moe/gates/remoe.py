"""ReMoE (Wang et al., 2024; arXiv 2412.14711): the combine weights are the ReLU of the logits.

    y = sum_e ReLU(x W)_e f_e(x)

An expert runs for the tokens that give it a positive weight, so tokens have different numbers of experts, or none. The
forward has no discrete choice, and the ordinary gradient is exact. An L1 loss with load balancing keeps k of E experts
active on average. In each layer it is

    lambda sum_e f_e mean_t R_te,   R = ReLU(x W),   f_e = E / k * (share of tokens with R_te > 0)

and lambda, common to all layers, follows the sparsity S, the share of zeros in R over the layers and tokens of a step:

    lambda <- lambda * alpha^sign((1 - k / E) - S),   lambda = 1e-8 at first, alpha = 1.2.

Constants and loss as in the authors' code (github.com/thu-ml/ReMoE), which sums the loss over layers without weight. There,
lambda also shrinks when S is exactly on target; here it stays, as the sign in the paper's formula says. At first
about half of the experts are active; the paper sees the target reached within some hundred steps.

A linear router without bias leaves half of the weights positive, whatever its size, if its inputs are symmetric around
zero. lambda then grows without effect, so it is bounded here; `router_bias` lets such a router reach the target. It is
also bounded from below: if fewer than k experts are active for long, it would reach zero and stay there.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_top_k
from fairseq_sparsemixer.moe.gates.losses import masked_mean, over_sequences, real_tokens, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.step_state import Amount, StepState

LARGEST = 1e3  # lambda at most; at 1, the loss is on the scale of a cross-entropy in nats
SMALLEST = 1e-30  # lambda at least; near 1e-45, where float32 ends, a factor of 1.2 would change it no more


class L1Coefficient(StepState):
    """lambda, for `top_k` of `num_experts` active experts. Amounts: the active (token, expert) pairs, and all such pairs.

    Raises ValueError for values out of range.
    """

    over_layers = True
    value: Tensor

    def __init__(self, num_experts: int, top_k: int, l1_coefficient: float, l1_multiplier: float):
        super().__init__(2)
        if not 0 < l1_coefficient <= LARGEST:
            raise ValueError(f"l1_coefficient={l1_coefficient} must lie in (0, {LARGEST:g}]; ReMoE starts at 1e-8")
        if not 1 <= l1_multiplier < math.inf:
            raise ValueError(f"l1_multiplier={l1_multiplier} must be at least 1 and finite; ReMoE uses 1.2")
        self.num_experts, self.top_k, self.multiplier = num_experts, top_k, l1_multiplier
        self.register_buffer("value", torch.tensor(max(float(l1_coefficient), SMALLEST)))

    def watch_sparsity(self, routing: Routing) -> Routing:
        """The routing; its backward counts active pairs."""
        pairs = routing.num_real_tokens() * self.num_experts
        return routing.watched(Amount(self, torch.stack([routing.chosen_count().sum(), pairs])))

    def step(self, total: Tensor) -> None:
        """One step towards the target sparsity."""
        active, pairs = total
        self.value *= self.multiplier ** torch.sign(active * self.num_experts - pairs * self.top_k)
        self.value.clamp_(SMALLEST, LARGEST)


def l1_loss(weights: Tensor, padding_mask: Optional[Tensor], top_k: int, scope: Optional[BalanceScope] = None) -> Tensor:
    """The L1 loss of weights [S, E] with load balancing, without lambda: a scalar, see balance_loss."""
    with torch.no_grad():
        share = masked_mean((weights > 0).to(weights.dtype), padding_mask, scope)  # [E]
    losses = weights.size(-1) / top_k * (share * masked_mean(weights, padding_mask, scope)).sum(-1)
    return over_sequences(losses, real_tokens(weights, padding_mask), scope)


def remoe_routing(
    logits: Tensor, padding_mask: Optional[Tensor], top_k: int, coefficient: Tensor, balance_scope: Optional[BalanceScope] = None
) -> Routing:
    """The experts with positive logits [S, E], weighted by them; the L1 loss aims at top_k per token.

    The Routing has E columns sorted by weight, of which `skipped` marks the zeros. `probabilities` are the shares of the
    weights.
    """
    weights = logits.relu()
    expert_index = logits.detach().argsort(dim=-1, descending=True, stable=True)
    weight = weights.gather(1, expert_index)
    total = weights.detach().sum(-1, keepdim=True)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={
            "l1": coefficient * l1_loss(weights, padding_mask, top_k, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=weights.detach() / total.clamp(min=torch.finfo(total.dtype).tiny),
        padding_mask=padding_mask,
        skipped=weight.detach() == 0,
    )


@register_gate("remoe")
class ReMoEGate(Gate):
    """ReMoE's gate. `top_k`: the mean number of experts per token to aim at. Raises ValueError for options out of range."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        top_k: int = 1,
        l1_coefficient: float = 1e-8,
        l1_multiplier: float = 1.2,
        router_bias: bool = False,
    ):
        super().__init__(model_dim, num_experts, router_bias=router_bias)
        self.top_k = require_top_k(top_k, num_experts)
        self.l1 = L1Coefficient(num_experts, top_k, l1_coefficient, l1_multiplier)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the positive part."""
        return logits.gather(1, expert_index).relu()

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See remoe_routing; in training, the backward counts the active experts."""
        routing = remoe_routing(logits, padding_mask, self.top_k, self.l1.value, self.balance_scope)
        return self.l1.watch_sparsity(routing) if self.training else routing
