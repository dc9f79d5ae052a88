"""Default MoE (Panda et al., 2025; arXiv 2504.12463): an expert that does not run contributes a running mean of its outputs.

    y = sum over the k chosen experts of pi_e f_e(x) + sum over the others of pi_e v_e,   pi = softmax(logits)

v_e, the default output of expert e, is an exponential moving average of its outputs. So every pi_e has a gradient, at the
cost of k experts. The weights of all experts sum to one, without renormalisation over the k.

The averages change once per optimizer step, by the mean m_e of f_e over all tokens that it ran for in the step, in all
micro-batches and on all ranks: v_e <- decay * v_e + (1 - decay) * m_e. They start at zero, keep their value in steps without
a token for the expert, and are used as they are at inference. An expert that drops a token for lack of capacity contributes
its default output, too.

Of the paper, only the abstract and summaries could be read: that defaults take the place of missing outputs and come from an
exponential moving average. That they count in the forward too, in training and at inference, that they start at zero, and
the decay of 0.95 follow a public reimplementation; it shrinks the averages of idle experts, which are kept here.
"""

from dataclasses import replace
from typing import Any, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import Gate, biased, hide_padding, require_top_k
from fairseq_sparsemixer.moe.gates.losses import balance_loss, router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import DefaultOutputs, Routing
from fairseq_sparsemixer.moe.gates.step_state import StepState


class OutputAverage(StepState):
    """The default outputs [E, M]. Amounts [E, M + 1]: the sum of an expert's outputs, and their number.

    Every rank has those of all experts. Raises ValueError for a decay out of range.
    """

    vectors: Tensor

    def __init__(self, num_experts: int, model_dim: int, default_decay: float):
        super().__init__(num_experts, model_dim + 1)
        if not 0 <= default_decay < 1:
            raise ValueError(f"default_decay={default_decay} must be at least 0 and below 1; 0.95 averages some 20 updates")
        self.decay = default_decay
        self.register_buffer("vectors", torch.zeros(num_experts, model_dim))

    def step(self, total: Tensor) -> None:
        """Move towards the means of the step; the average of an expert without a token is unchanged."""
        sums, counts = total[:, :-1], total[:, -1:]
        towards = sums / counts.clamp(min=1) - self.vectors
        self.vectors += (1 - self.decay) * towards * (counts > 0)


def default_moe_routing(
    logits: Tensor,
    padding_mask: Optional[Tensor],
    top_k: int,
    vectors: Tensor,
    balance_scope: Optional[BalanceScope] = None,
    bias: Optional[Tensor] = None,
) -> Routing:
    """The top_k experts for logits [S, E], and the weights of the default outputs, vectors [E, M], of the others."""
    probabilities = logits.softmax(-1)  # [S, E]
    expert_index = biased(logits, bias).topk(top_k, -1).indices  # [S, k]
    weight = probabilities.gather(1, expert_index)
    others = probabilities.scatter(1, expert_index, 0.0)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weight, padding_mask),
        aux_losses={
            "balance": balance_loss(probabilities, expert_index, padding_mask, balance_scope),
            "router_z": router_z_loss(logits, padding_mask),
        },
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
        default=DefaultOutputs(hide_padding(others, padding_mask), vectors),
    )


@register_gate("default_moe")
class DefaultMoEGate(Gate):
    """Default MoE's gate. `default_decay`: of the averages. Raises ValueError for options out of range."""

    has_defaults = True

    def __init__(self, model_dim: int, num_experts: int, top_k: int = 1, default_decay: float = 0.95, **balancing: Any):
        super().__init__(model_dim, num_experts, **balancing)
        self.top_k = require_top_k(top_k, num_experts)
        self.average = OutputAverage(num_experts, model_dim, default_decay)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See default_moe_routing; in training, the combined output's backward counts the experts' outputs."""
        vectors = self.average.vectors
        routing = default_moe_routing(logits, padding_mask, self.top_k, vectors, self.balance_scope, self.selection_bias)
        assert routing.default is not None
        return replace(routing, default=routing.default._replace(average=self.average)) if self.training else routing

    def limit(self, routing: Routing) -> Routing:
        """See Gate.limit; dropped choices weigh the default outputs."""
        limited = super().limit(routing)
        assert routing.default is not None and limited.dropped is not None
        lost = routing.combine_weight.masked_fill(~limited.dropped, 0)  # [S, k]
        weight = routing.default.weight.scatter_add(1, routing.expert_index, lost)
        return replace(limited, default=routing.default._replace(weight=weight))
