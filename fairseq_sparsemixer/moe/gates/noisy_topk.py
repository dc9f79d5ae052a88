"""Noisy top-k gating (Shazeer et al., 2017; arXiv 1701.06538): learned noise, then a softmax over the k best.

    H(x)_i = (x W_g)_i + z_i * softplus((x W_noise)_i),  z_i ~ N(0, 1) in training, 0 at inference     (Eq. 4)
    G(x) = softmax(KeepTopK(H(x), k))                                                                  (Eqs. 3, 5)

Two losses balance it, each a squared coefficient of variation over the experts: of the importance, which is the sum of G
over tokens (Eqs. 6, 7), and of a smooth estimate of the load, which is the sum over tokens of the probability that fresh
noise on expert i alone would put it among the k (Eqs. 8 to 11). With k = 1 the weight is always 1, and the router learns
only from these losses.
"""

from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, project, require_top_k
from fairseq_sparsemixer.moe.gates.losses import cv_squared, masked_sum, over_sequences, real_tokens, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


class GaussianNoise(NamedTuple):
    """normal [S, E], standard; std [S, E], positive, carries the gradient of the noise projection."""

    normal: Tensor
    std: Tensor


def noisy_topk_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    top_k: int,
    noise: Optional[GaussianNoise] = None,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """The top_k experts by noisy logits [S, E], weighted by the softmax over these k; noise=None means no noise.

    bias [E], if given, is used for the choice only. The statistics use the softmax of the logits without noise.
    """
    noisy = logits if noise is None else logits + noise.normal * noise.std  # H, [S, E]
    shift = logits.new_zeros(()) if bias is None else bias.to(logits.dtype)
    expert_index = biased(noisy, bias).topk(top_k, -1).indices  # [S, k]
    weight = hide_padding(noisy.gather(1, expert_index).softmax(-1), padding_mask)
    gates = torch.zeros_like(logits).scatter(1, expert_index, weight)  # G, [S, E]
    load = probability_of_choice(logits + shift, noisy + shift, top_k, noise)  # [S, E]
    return Routing(
        expert_index=expert_index,
        combine_weight=weight,
        aux_losses={
            "importance": unevenness(gates, padding_mask, balance_scope),
            "load": unevenness(load, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=logits.detach().softmax(-1),
        padding_mask=padding_mask,
    )


def unevenness(values: Tensor, padding_mask: Optional[Tensor], scope: Optional[BalanceScope]) -> Tensor:
    """The squared coefficient of variation of the experts' sums of values [S, E]: a scalar, see cv_squared."""
    losses = cv_squared(masked_sum(values, padding_mask, scope))
    return over_sequences(losses, real_tokens(values, padding_mask), scope)


def probability_of_choice(logits: Tensor, noisy: Tensor, top_k: int, noise: Optional[GaussianNoise]) -> Tensor:
    """P(x, i) [S, E] of Eq. 9: that expert i is among the top_k if only its own noise is redrawn.

    Without noise, this is 1 for the top_k and 0 for the others.
    """
    if top_k == logits.size(-1):
        return torch.ones_like(logits)
    best = noisy.topk(top_k + 1, -1)
    chosen = torch.zeros_like(noisy, dtype=torch.bool).scatter_(1, best.indices[:, :top_k], True)
    if noise is None:
        return chosen.to(logits.dtype)
    # the k-th largest among the other experts; for an expert in the top k, this is the (k + 1)-th overall
    threshold = torch.where(chosen, best.values[:, top_k:], best.values[:, top_k - 1 : top_k])
    probability: Tensor = torch.special.ndtr((logits - threshold) / noise.std)
    return probability


@register_gate("noisy_topk")
class NoisyTopKGate(Gate):
    """Shazeer's gate. Both projections are initialised to zero, as in the paper: equal loads, and noise of ln 2.

    `route(logits)` adds no noise; `route(logits, noise_std=...)` does, in training. Raises ValueError for a bad top_k.
    """

    def __init__(self, model_dim: int, num_experts: int, top_k: int = 2, **balancing: Any):
        super().__init__(model_dim, num_experts, **balancing)
        self.top_k = require_top_k(top_k, num_experts)
        self.noise_projection = nn.Linear(model_dim, num_experts, bias=False)
        nn.init.zeros_(self.projection.weight)
        nn.init.zeros_(self.noise_projection.weight)

    def draw_noise(self, std: Optional[Tensor]) -> Optional[GaussianNoise]:
        """The noise of one forward pass, for std [S, E]; None at inference or without std."""
        return GaussianNoise(torch.randn_like(std), std) if self.training and std is not None else None

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the softmax over these experts."""
        chosen = logits.gather(1, expert_index)
        return (chosen if skipped is None else chosen.masked_fill(skipped, torch.finfo(chosen.dtype).min)).softmax(-1)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None, noise_std: Optional[Tensor] = None) -> Routing:
        """See noisy_topk_routing."""
        noise = self.draw_noise(noise_std)
        return noisy_topk_routing(logits, padding_mask, self.top_k, noise, self.balance_scope, self.selection_bias)

    def forward(self, tokens: Tensor, padding_mask: Optional[Tensor] = None, token_ids: Optional[Tensor] = None) -> Routing:
        """See Gate.forward."""
        noise_std = F.softplus(project(tokens, self.noise_projection.weight)) if self.training else None
        return self.route(self.logits(tokens), padding_mask, noise_std=noise_std)
