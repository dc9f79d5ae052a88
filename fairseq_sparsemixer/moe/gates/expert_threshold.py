"""Expert threshold routing (Sun et al., 2026; arXiv 2603.11535): expert choice that looks at one token at a time.

Expert e takes a token if its logit exceeds the expert's threshold c_e, and weighs its output by the score sigmoid(logit):

    y = sum of sigmoid(logit_e) f_e(x) over the experts with logit_e > c_e

Tokens have different numbers of experts, or none. c_e tracks the logit that k / E of all tokens exceed, so loads are
balanced without a loss: it is an exponential moving average of the batch's C-th largest logit of the expert, with
C = ceil(k S / E), corrected for its start as in Adam. For the first `warmup_updates` an expert takes the C best tokens of
the batch instead, as in expert choice, because untrained thresholds starve experts.

The paper's constants: k = 1, 4000 updates of warm-up; the decay of 0.99 is in the authors' code. Differences: C is rounded up
as in expert_choice.py; the averages of micro-batches and ranks are weighted by their tokens; the paper's bounds on an
expert's tokens in training, and its shared expert (`num_shared_experts`), are left to the user.
"""

import math
from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.capacity import expert_capacity
from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_top_k
from fairseq_sparsemixer.moe.gates.losses import router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.step_state import Amount, StepState


class Thresholds(StepState):
    """The thresholds [E] and the number of their updates. Amounts [E + 1]: batch cut-offs times tokens, and tokens.

    Raises ValueError for a decay out of range.
    """

    value: Tensor
    updates: Tensor

    def __init__(self, num_experts: int, threshold_decay: float):
        super().__init__(num_experts + 1)
        if not 0 <= threshold_decay < 1:
            raise ValueError(f"threshold_decay={threshold_decay} must be at least 0 and below 1; the authors use 0.99")
        self.decay = threshold_decay
        self.register_buffer("value", torch.zeros(num_experts))
        self.register_buffer("updates", torch.zeros(()))

    def watch_cutoffs(self, routing: Routing, cutoffs: Tensor) -> Routing:
        """The routing of a batch; its backward counts the batch's cutoffs [E]."""
        tokens = routing.num_real_tokens().to(cutoffs.dtype).reshape(1)
        return routing.watched(Amount(self, torch.cat([cutoffs * tokens, tokens])))

    def step(self, total: Tensor) -> None:
        """Move towards the mean cut-offs of the step; without tokens, nothing changes."""
        tokens = total[-1]
        seen = (tokens > 0).to(total.dtype)
        self.updates += seen
        # the mean so far, corrected for its start: m_n / (1 - decay^n) for m_n <- decay m_(n-1) + (1 - decay) cutoff
        share = (1 - self.decay) / (1 - self.decay ** self.updates.clamp(min=1))
        self.value += seen * share * (total[:-1] / tokens.clamp(min=1) - self.value)


@torch.no_grad()
def batch_cutoffs(logits: Tensor, padding_mask: Optional[Tensor], top_k: int) -> Tensor:
    """[E]: the C-th largest of each expert's logits [S, E], padding excluded, C = ceil(top_k * tokens / E); 0 without tokens."""
    num_tokens, num_experts = logits.shape
    if not num_tokens:
        return logits.new_zeros(num_experts)
    real = torch.full((), num_tokens, dtype=torch.int64, device=logits.device)
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask.unsqueeze(-1), -math.inf)
        real = (~padding_mask).sum()
    place = torch.minimum(expert_capacity(real, num_experts, top_k), real).clamp(min=1) - 1
    cutoffs = logits.sort(dim=0, descending=True).values.index_select(0, place.reshape(1)).squeeze(0)
    return cutoffs.masked_fill(real == 0, 0)


def expert_threshold_routing(logits: Tensor, padding_mask: Optional[Tensor], taken: Tensor) -> Routing:
    """The experts that take a token, taken [S, E], for logits [S, E].

    The Routing has E columns sorted by logit; `skipped` marks those that do not take the token. `probabilities` are the
    shares of the scores.
    """
    scores = logits.sigmoid()
    expert_index = logits.detach().argsort(dim=-1, descending=True, stable=True)
    skipped = ~taken.gather(1, expert_index)
    weight = scores.gather(1, expert_index).masked_fill(skipped, 0)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={"router_z": router_z_loss(logits, padding_mask)},
        probabilities=torch.nn.functional.normalize(scores.detach(), p=1, dim=-1),
        padding_mask=padding_mask,
        skipped=skipped,
    )


@register_gate("expert_threshold")
class ExpertThresholdGate(Gate):
    """The gate of expert threshold routing. `top_k`: the mean number of experts per token to aim at.

    `threshold_decay`: of the moving average; `warmup_updates`: the updates of expert choice before thresholds decide in
    training. Raises ValueError for options out of range.
    """

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        top_k: int = 1,
        threshold_decay: float = 0.99,
        warmup_updates: int = 4000,
        router_bias: bool = False,
    ):
        super().__init__(model_dim, num_experts, router_bias=router_bias)
        self.top_k = require_top_k(top_k, num_experts)
        self.threshold = Thresholds(num_experts, threshold_decay)
        if not warmup_updates >= 0:
            raise ValueError(f"warmup_updates={warmup_updates} must be at least 0; the paper uses 4000")
        self.warmup_updates = warmup_updates

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the sigmoid."""
        return logits.gather(1, expert_index).sigmoid()

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See expert_threshold_routing; in training, the backward counts the batch's cut-offs."""
        taken = ~(logits <= self.threshold.value)  # NaN is taken, and so reaches the output
        if not self.training:
            return expert_threshold_routing(logits, padding_mask, taken)
        cutoffs = batch_cutoffs(logits, padding_mask, self.top_k)
        warming_up = self.threshold.updates < self.warmup_updates
        routing = expert_threshold_routing(logits, padding_mask, torch.where(warming_up, ~(logits < cutoffs), taken))
        return self.threshold.watch_cutoffs(routing, cutoffs)
