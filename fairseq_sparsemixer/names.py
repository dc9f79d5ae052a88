"""What a model's state dict calls the parts of an MoE layer."""

from typing import Iterable

LAYER = ".fc1.moe"  # behind the name of the transformer layer that it stands in
EXPERTS = ".experts."  # in the name of every parameter of an expert
FIRST_WEIGHT, LAST_WEIGHT = ".experts.weight_in", ".experts.weight_out"  # [E, M, H] and [E, H, M]
SHARED_EXPERTS = ".moe.shared_experts."
GATE = ".moe.gate."
PROJECTION = ".gate.projection.weight"  # [E, M], the router's


def transformer_layer(moe_layer: str) -> str:
    """The name of the transformer layer around the MoE layer of that name; the name itself for a layer on its own."""
    return moe_layer[: -len(LAYER)] if moe_layer.endswith(LAYER) else moe_layer


def count_layers(names: Iterable[str]) -> int:
    """The MoE layers among the parameters of these names."""
    return sum(name.endswith(FIRST_WEIGHT) for name in names)
