"""A top-1 router that becomes Switch or SparseMixer, one part at a time.

The multiplier of the chosen expert has the value `v s` and the gradient of `gain c p`, where p is a softmax, s the node:

    value      v      c
    p          p      1    Switch's, SparseMixer's
    scaled     E p    E    as large as 1 for an even router
    one        1      1    the output does not depend on the router, its gradient does
"""

from dataclasses import replace
from typing import Any, Dict, Optional

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_jitter
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.sparsemixer import draw_sampling_noise, mask_unlikely
from fairseq_sparsemixer.moe.gates.step_state import StepState

VALUES = ("p", "scaled", "one")
SOFTMAXES = ("masked", "whole")


class Width(StepState):
    """The mask's width, which grows from `start` to infinity (`widened_by` updates) or shrinks to it (`narrowed_by`)."""

    updates: Tensor

    def __init__(self, start: float, widened_by: int, narrowed_by: int):
        super().__init__()
        if min(widened_by, narrowed_by) < 0 or (widened_by and narrowed_by):
            raise ValueError(
                f"widened_by={widened_by}, narrowed_by={narrowed_by}: one may be a number of updates, the other is 0"
            )
        self.start, self.widened_by, self.narrowed_by = start, widened_by, narrowed_by
        self.register_buffer("updates", torch.zeros(()))

    def step(self, total: Tensor) -> None:
        """One update more, if there were batches."""
        self.updates += (total > 0).to(total.dtype)

    def now(self) -> Tensor:
        """A scalar."""
        share = (self.updates / (self.widened_by or self.narrowed_by)).clamp(max=1)
        return self.start / (1 - share if self.widened_by else share)  # x / 0 is infinity


@register_gate("sparsemixer_parts")
class PartsGate(Gate):
    """The defaults are SparseMixer's. Raises ValueError for an unknown choice.

    sampled: draw the expert from the softmax of the masked logits, else take the arg-max. jitter_eps: SparseMixer's mask,
    infinity for none; widened_by, narrowed_by: see Width. softmax: over the masked or the whole logits, for the multiplier's p.
    value: see the top of this file. gain: of the gradient. coin: run the expert at half its multiplier half of the time, where
    it is not the arg-max; a number below 1 does so for that share of those tokens only. scale: a trainable vector omega on the
    layer's output.
    balance: the balance loss over the masked or the whole softmax. noise: in training, the logits are multiplied by uniform
    noise in [1 - noise, 1 + noise], as in Switch.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        jitter_eps: float = 0.1,
        sampled: bool = True,
        softmax: str = "masked",
        value: str = "p",
        gain: float = 2.0,
        coin: float = 1.0,
        scale: bool = True,
        balance: str = "masked",
        noise: float = 0.0,
        widened_by: int = 0,
        narrowed_by: int = 0,
        **balancing: Any,
    ):
        super().__init__(model_dim, num_experts, **balancing)
        self.jitter_eps = require_jitter(jitter_eps)
        self.width = Width(self.jitter_eps, widened_by, narrowed_by) if widened_by or narrowed_by else None
        self.sampled, self.gain, self.coin, self.noise = bool(sampled), gain, float(coin), noise
        self.softmax = _require(softmax, "softmax", SOFTMAXES)
        self.value = _require(value, "value", VALUES)
        self.balance = _require(balance, "balance", SOFTMAXES)
        self.omega = nn.Parameter(torch.ones(model_dim)) if scale else None

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """logits [S, E] -> one expert per token."""
        if self.training and self.noise:
            logits = logits * torch.empty_like(logits).uniform_(1 - self.noise, 1 + self.noise)
        masked = mask_unlikely(logits, self.jitter_eps if self.width is None else self.width.now())
        softmaxes: Dict[str, Tensor] = {"masked": masked.softmax(-1), "whole": logits.softmax(-1)}
        noise = draw_sampling_noise(logits) if self.training and (self.sampled or self.coin) else None
        argmax = logits.argmax(-1, keepdim=True)  # [S, 1]
        expert_index = argmax if noise is None or not self.sampled else (masked.detach() + noise.gumbel).argmax(-1, keepdim=True)
        node = torch.ones_like(argmax, dtype=logits.dtype)
        if noise is not None and self.coin:
            node = torch.where((expert_index == argmax) | (noise.coin.unsqueeze(-1) >= self.coin / 2), 1.0, 0.5).to(logits.dtype)
        weight = self.multiplier(softmaxes[self.softmax].gather(1, expert_index), node)
        if self.training and self.width is not None:
            weight = self.width.watch(weight, torch.ones_like(self.width.updates))
        routing = Routing(
            expert_index=expert_index,
            combine_weight=hide_padding(weight, padding_mask),
            aux_losses={
                "balance": balance_loss(softmaxes[self.balance], expert_index, padding_mask, self.balance_scope),
                "router_z": router_z_loss(logits, padding_mask),
            },
            probabilities=softmaxes["whole"].detach(),
            padding_mask=padding_mask,
        )
        return routing if self.omega is None else replace(routing, output_scale=self.omega)

    def multiplier(self, probability: Tensor, node: Tensor) -> Tensor:
        """probability, node [S, 1] -> the multiplier [S, 1], with its gradient."""
        scale = self.num_experts if self.value == "scaled" else 1
        value = torch.ones_like(probability) if self.value == "one" else scale * probability.detach()
        return value * node + self.gain * scale * (probability - probability.detach())


def _require(value: str, name: str, choices: Any) -> str:
    if value not in choices:
        raise ValueError(f"{name}={value} must be one of {', '.join(choices)}")
    return value
