"""Conditional MoE routing (CMR): a shared feed-forward network beside the MoE layer, and a gate that mixes both.

Elbayad et al., 2022 (arXiv 2212.07571), as in fairseq's branch nllb. For a token x:

    g = sigmoid(w . x + c)
    y = (1 - g) shared(x) + g moe(x)

In training, gate dropout sets g to 0 with probability P, and to g / (1 - P) otherwise. The budget loss |mean g - p| is over the
tokens of all layers together, padding excluded: layers may differ in how much they use their experts.
"""

from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairseq_sparsemixer.moe.dispatch.combine import weigh_rows
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.feed_forward import Activation
from fairseq_sparsemixer.moe.gates.balance_scope import BalanceScope
from fairseq_sparsemixer.moe.gates.gate import project, require_probability
from fairseq_sparsemixer.moe.gates.routing import Routing


class ConditionalRouting(nn.Module):
    """The shared network M -> hidden_dim -> M, and the gate. `activation` and `dropout` are those of Experts.

    gate_dropout: P, in [0, 1). Raises ValueError for other values.
    """

    def __init__(
        self,
        model_dim: int,
        hidden_dim: int,
        activation: Union[str, Activation] = "relu",
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
    ):
        super().__init__()
        self.shared = Experts(1, model_dim, hidden_dim, activation, dropout)
        self.gate = nn.Linear(model_dim, 1)
        self.gate_dropout = require_probability("gate_dropout", gate_dropout, "disables it")

    def forward(self, tokens: Tensor, routed: Tensor, padding_mask: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        """tokens [S, M], the MoE layer's output [S, M], padding_mask [S] -> (y [S, M], g [S] in float32), zero at padding."""
        gate = project(tokens, self.gate.weight, self.gate.bias).squeeze(-1).sigmoid()
        gate = F.dropout(gate, self.gate_dropout, self.training)
        shared = self.shared(tokens, [len(tokens)])
        if padding_mask is not None:
            gate = gate.masked_fill(padding_mask, 0)
            shared = shared.masked_fill(padding_mask.unsqueeze(-1), 0)
        return shared + weigh_rows(routed - shared, gate), gate


def budget_loss(routings: Sequence[Routing], budget: float, scope: Optional[BalanceScope] = None) -> Tensor:
    """|mean g - budget| over the tokens of one or more layers with CMR, padding excluded: a scalar; zero without tokens.

    With a scope that spans forwards, over the tokens of all of them. The loss is not one for each sequence.
    """
    gates = [routing.cmr_gate for routing in routings if routing.cmr_gate is not None]
    used = torch.stack([gate.sum() for gate in gates]).sum()
    count = torch.stack([routing.num_real_tokens() for routing in routings]).sum().to(used.dtype)
    if scope is not None and scope.spans_forwards:
        used, count = scope.total(torch.stack([used, count]))
    return (used / count.clamp(min=1) - budget).abs() * (count > 0)
