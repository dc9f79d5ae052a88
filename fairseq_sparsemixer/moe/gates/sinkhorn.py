"""Sinkhorn routing, as in Megatron-Core (`--moe-router-load-balancing-type sinkhorn`; S-BASE, arXiv 2202.01169).

In training, the rows and columns of exp(logits) are scaled until every token sums to 1 / S and every expert to 1 / E. Each
token takes its k largest entries: nearly balanced, without gradient. At inference it takes its k largest logits. The
weights are sigmoid(logit) for k = 1 and softmax(logits) otherwise, not renormalised over the k. No balance loss.
"""

from typing import Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_top_k
from fairseq_sparsemixer.moe.gates.losses import router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing

TOLERANCE = 1e-4  # on the mean change of the column factors, as in Megatron-Core
MAX_ITERATIONS = 100
LOOK_EVERY = 10  # iterations between looks at a GPU, which the host waits for; once settled, further ones change nothing
TINY = 1e-8  # avoids division by zero, as in Megatron-Core


@torch.no_grad()
def sinkhorn(logits: Tensor, padding_mask: Optional[Tensor] = None) -> Tensor:
    """[S, E]: exp(logits) scaled to row sums 1 / S and column sums 1 / E; padding rows are 0 and not counted in S."""
    kernel = (logits - logits.amax(-1, keepdim=True)).exp()  # the row scale is arbitrary; this one cannot overflow
    rows = torch.full((), max(len(logits), 1), dtype=kernel.dtype, device=kernel.device)
    if padding_mask is not None:
        kernel = kernel.masked_fill(padding_mask.unsqueeze(-1), 0)
        rows = (~padding_mask).sum().clamp(min=1).to(kernel.dtype)
    row = kernel.new_ones(kernel.size(0))
    column = kernel.new_ones(kernel.size(1))
    settled = torch.zeros((), dtype=torch.bool, device=kernel.device)
    for iteration in range(1, MAX_ITERATIONS + 1):
        before = column
        row = torch.where(settled, row, (rows * (kernel.mv(column) + TINY)).reciprocal())
        column = torch.where(settled, column, (kernel.size(1) * (kernel.t().mv(row) + TINY)).reciprocal())
        settled = (column - before).abs().mean() <= TOLERANCE
        if iteration % (LOOK_EVERY if kernel.is_cuda else 1) == 0 and settled:
            break
    return kernel * column * row.unsqueeze(1)


def sinkhorn_routing(logits: Tensor, padding_mask: Optional[Tensor], top_k: int, balanced: bool) -> Routing:
    """The top_k experts for logits [S, E], after Sinkhorn scaling if balanced (training)."""
    selection = sinkhorn(logits, padding_mask) if balanced else logits
    expert_index = selection.topk(top_k, -1).indices  # [S, k]
    probabilities = logits.softmax(-1)  # [S, E]
    weights = logits.sigmoid() if top_k == 1 else probabilities
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(weights.gather(1, expert_index), padding_mask),
        aux_losses={"router_z": router_z_loss(logits, padding_mask)},
        probabilities=probabilities.detach(),
        padding_mask=padding_mask,
    )


@register_gate("sinkhorn")
class SinkhornGate(Gate):
    """The gate of Sinkhorn routing. Raises ValueError for a bad top_k."""

    def __init__(
        self,
        model_dim: int,
        num_experts: int,
        top_k: int = 1,
        capacity_factor: Optional[float] = None,
        capacity_policy: str = "position",
        eval_capacity_factor: Optional[float] = None,
    ):
        super().__init__(
            model_dim,
            num_experts,
            capacity_factor,
            capacity_policy=capacity_policy,
            eval_capacity_factor=eval_capacity_factor,
        )
        self.top_k = require_top_k(top_k, num_experts)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the sigmoid for one expert, the softmax for several."""
        return (logits.sigmoid() if self.top_k == 1 else logits.softmax(-1)).gather(1, expert_index)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See sinkhorn_routing."""
        return sinkhorn_routing(logits, padding_mask, self.top_k, self.training)
