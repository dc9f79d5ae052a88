"""Counts a model's parameters, and those active for one token."""

from typing import Tuple

from torch import nn

from fairseq_sparsemixer.moe.layer import MoELayer


def parameter_counts(model: nn.Module) -> Tuple[int, int]:
    """(total, active): all parameters, and those used for one token: k of E experts per MoE layer and all shared experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            gate = layer.gate
            experts = sum(parameter.numel() for parameter in layer.experts.parameters())
            idle += experts - round(experts * gate.experts_per_token / gate.num_experts)
    return total, total - idle
