"""How many parameters a model has, and how many of them one token meets."""

from typing import Tuple

from torch import nn

from fairseq_sparsemixer.moe.layer import MoELayer


def parameter_counts(model: nn.Module) -> Tuple[int, int]:
    """(total, active): all parameters, and those used for one token: k of E experts in each MoE layer, shared ones all."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            gate = layer.gate
            experts = sum(parameter.numel() for parameter in layer.experts.parameters())
            idle += experts - round(experts * gate.experts_per_token / gate.num_experts)
    return total, total - idle
