"""Names of an MoE layer's parts in a model's state dict, and of fairseq's backends for data parallelism."""

import re
from typing import Iterable

LAYER = ".fc1.moe"  # follows the name of the enclosing transformer layer
EXPERTS = ".experts."  # in the name of every parameter of an expert
ADAPTERS = ".experts.lora_"  # in the name of every parameter of an expert's adapters
FIRST_WEIGHT, LAST_WEIGHT = ".experts.weight_in", ".experts.weight_out"  # [E, M, H] and [E, H, M]
SHARED_EXPERTS = ".moe.shared_experts."
CMR = ".moe.cmr."
GATE = ".moe.gate."
PROJECTION = ".gate.projection.weight"  # [E, M], of the router
WRAPPERS = re.compile(r"^(module\.)+")  # the prefix that wrappers for data parallelism give the names of parts
LEGACY_DDP, PYTORCH_DDP = ("legacy_ddp", "no_c10d"), ("pytorch_ddp", "c10d")  # each with its former name


def transformer_layer(moe_layer: str) -> str:
    """The name of the transformer layer that encloses this MoE layer; the name itself for a standalone layer."""
    return moe_layer[: -len(LAYER)] if moe_layer.endswith(LAYER) else moe_layer


def count_layers(names: Iterable[str]) -> int:
    """The number of MoE layers among these parameter names."""
    return sum(name.endswith(FIRST_WEIGHT) for name in names)
