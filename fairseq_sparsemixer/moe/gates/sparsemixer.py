"""SparseMixer (Liu, Gao, Chen, 2023; arXiv 2310.00811): one sampled expert, with the router gradient that Switch drops."""

from dataclasses import replace
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.estimators import Estimator, get_estimator
from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.fused import draw_uniform, fused_routing, is_fused, mixer_options
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, require_jitter
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing


class SamplingNoise(NamedTuple):
    """The random numbers of one forward pass: gumbel [S, E] picks the expert, coin [S] in [0, 1) the estimator's node."""

    gumbel: Tensor
    coin: Tensor


def draw_sampling_noise(logits: Tensor) -> SamplingNoise:
    """Fresh noise for logits [S, E], from torch's default generator."""
    return SamplingNoise(
        gumbel=torch.rand_like(logits).log_().neg_().log_().neg_(),  # several times faster on CPUs than exponential_
        coin=draw_coin(logits),
    )


def draw_coin(logits: Tensor) -> Tensor:
    """A fresh coin [S] in [0, 1) for logits [S, E]."""
    return torch.rand(logits.size(0), dtype=logits.dtype, device=logits.device)


def mask_unlikely(logits: Tensor, jitter_eps: float, keep: Optional[Tensor] = None) -> Tensor:
    """logits [S, E] with -inf for experts that jitter of +-eps could never make the arg-max.

    Expert i is masked if (theta_max - theta_i) / max(|theta_i|, theta_max) > 2 eps. The arg-max always stays, and the
    experts keep [S, K].
    """
    with torch.no_grad():
        top = logits.amax(-1, keepdim=True)  # [S, 1]
        out = (top - logits) / torch.maximum(logits.abs(), top) > 2 * jitter_eps  # 0 / 0 is not greater: not masked
        if keep is not None:
            out = out.scatter(1, keep, False)
    return logits.masked_fill(out, float("-inf"))


class Draw(NamedTuple):
    """One expert per token: expert_index [S, 1], its multiplier weight [S, 1], and the masked softmax [S, E]."""

    expert_index: Tensor
    weight: Tensor
    probabilities: Tensor


def draw_expert(
    logits: Tensor,
    jitter_eps: float,
    estimator: Estimator,
    noise: Optional[SamplingNoise] = None,
    bias: Optional[Tensor] = None,
) -> Draw:
    """Sample one expert per token from the masked softmax of logits [S, E]; without noise (inference), take the arg-max.

    The multiplier is the expert's probability times the estimator's node; see estimators.py for its gradient. Experts
    whose logit is -inf are never drawn. A bias [E] is added to the masked logits for the draw only: the sampling
    distribution then differs from the softmax that weighs the sample, and the estimators are valid only for b = 0.
    """
    masked = mask_unlikely(logits, jitter_eps)  # [S, E]
    probabilities = masked.softmax(-1)  # [S, E]
    argmax = logits.argmax(-1, keepdim=True)  # [S, 1]
    selection = biased(masked, bias)
    if noise is None:
        expert_index = selection.argmax(-1, keepdim=True)
        return Draw(expert_index, probabilities.gather(1, expert_index), probabilities)
    expert_index = (selection + noise.gumbel).argmax(-1, keepdim=True)
    chosen = probabilities.gather(1, expert_index)
    weight = estimator.multiplier(chosen, noise.coin.unsqueeze(-1), expert_index == argmax)
    return Draw(expert_index, weight, probabilities)


def sparsemixer_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    jitter_eps: float,
    estimator: Estimator,
    noise: Optional[SamplingNoise] = None,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """One expert per token for logits [S, E], drawn by draw_expert; without noise (inference), the arg-max."""
    expert_index, weight, probabilities = draw_expert(logits, jitter_eps, estimator, noise, bias)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, expert_index, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


@register_gate("sparsemixer")
class SparseMixerGate(Gate):
    """SparseMixer's gate, with the trainable vector omega [M] that scales the layer's output.

    `jitter_eps` masks experts before sampling: 0 masks all but the arg-max, infinity none. `gradient_estimator` is one of
    estimators.ESTIMATORS; as in the paper, it does not apply to the arg-max expert unless `estimator_at_argmax`.
    Not the paper's: without `sampled`, training takes the arg-max, too, and keeps the mask, the masked softmax and the
    estimator's gain (see docs/why.md); without `scaled`, there is no omega.
    Raises ValueError for a negative jitter or an unknown estimator.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        jitter_eps: float = 0.1,
        gradient_estimator: str = "midpoint",
        estimator_at_argmax: bool = False,
        sampled: bool = True,
        scaled: bool = True,
        **balancing: Any,
    ):
        super().__init__(model_dim, num_experts, **balancing)
        self.jitter_eps = require_jitter(jitter_eps)
        self.estimator = get_estimator(gradient_estimator, first_order_argmax=not estimator_at_argmax)
        self.sampled = sampled
        self.omega = nn.Parameter(torch.ones(model_dim)) if scaled else None

    def draw_noise(self, logits: Tensor) -> Optional[SamplingNoise]:
        """The noise of one forward pass over logits [S, E]; None at inference."""
        if not self.training:
            return None
        if self.sampled:
            return draw_sampling_noise(logits)
        return SamplingNoise(torch.zeros_like(logits), draw_coin(logits))

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the masked softmax, in which these experts stay; not sampled, so without the estimator."""
        return mask_unlikely(logits, self.jitter_eps, keep=expert_index).softmax(-1).gather(1, expert_index)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See sparsemixer_routing."""
        if is_fused(logits, self.balance_scope):
            options = mixer_options("sparsemixer", 1, self.jitter_eps, self.estimator, self.training, self.sampled)
            noise = draw_uniform(logits, 1) if self.training else None
            routing = fused_routing(logits, padding_mask, noise, self.selection_bias, options)
        else:
            routing = sparsemixer_routing(
                logits,
                padding_mask,
                self.jitter_eps,
                self.estimator,
                self.draw_noise(logits),
                self.balance_scope,
                self.selection_bias,
            )
        return replace(routing, output_scale=self.omega)
