"""What a checkpoint holds: its experts, its parameters, the work it does for a token, and how alike its experts are.

All of it is read from the file alone; no dictionary and no model is needed. E experts, M model dimension.
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.checkpoints.layout import layout_of
from fairseq_sparsemixer.checkpoints.reading import read_checkpoint
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.gates import DENSE, build_gate
from fairseq_sparsemixer.models.architectures import fill_defaults
from fairseq_sparsemixer.models.config import MoEOptions, router_options

FIRST_WEIGHT, EXPERTS, PROJECTION = ".experts.weight_in", ".experts.", ".gate.projection.weight"
STACKS = ("encoder", "decoder")


@dataclass(frozen=True)
class LayerReport:
    """name: of the transformer layer. similarities: mean over pairs of experts of the cosine, of the rows of the router's
    projection and of all weights of an expert; None for a router without projection, and for one expert.
    """

    name: str
    num_experts: int
    model_dim: int
    hidden_dim: int
    parameters: int
    router_similarity: Optional[float]
    expert_similarity: Optional[float]


@dataclass(frozen=True)
class CheckpointReport:
    """parameters: those of all experts; active: those one token meets. flops: of the forward pass for one token of each
    stack, two for each weight of its matrices, embedding look-ups and the products of attention weights left out.
    """

    router: str
    top_k: int
    updates: Optional[int]
    parameters: int
    active: int
    flops: Dict[str, int]
    layers: List[LayerReport]


def inspect_checkpoint(path: str) -> CheckpointReport:
    """Read the report off a checkpoint of fairseq. Raises ConfigurationError for a file that cannot be used."""
    state = read_checkpoint(path)
    if layout_of(state)["size"] > 1:
        raise ConfigurationError(
            f"{path} is one file of a sharded checkpoint, without the experts of other ranks;"
            " make one file of all: fairseq-sparsemixer reshard IN OUT --portable"
        )
    weights = distinct_tensors(state["model"])
    layers = [layer_report(weights, name) for name in weights if name.endswith(FIRST_WEIGHT)]
    options = model_options(state)
    top_k = experts_for_a_token(options, layers)
    share = {name: top_k / _experts_of(weights, name) if EXPERTS in name else 1 for name in weights}
    return CheckpointReport(
        router=getattr(options, "router", DENSE) if layers else DENSE,
        top_k=top_k,
        updates=_updates(state),
        parameters=sum(weight.numel() for weight in weights.values()),
        active=round(sum(weight.numel() * share[name] for name, weight in weights.items())),
        flops={stack: round(2 * _matrix_weights(state["model"], stack, share)) for stack in STACKS if _has(weights, stack)},
        layers=layers,
    )


def distinct_tensors(state: Dict[str, Any]) -> Dict[str, Tensor]:
    """The floating point tensors of more than one number, each once: tied weights stand in a state under several names."""
    found: Dict[Any, str] = {}
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.numel() > 1:
            found.setdefault((value.data_ptr(), value.shape), name)
    return {name: state[name] for name in found.values()}


def layer_report(weights: Dict[str, Tensor], first_weight: str) -> LayerReport:
    """The report of the MoE layer whose experts' first weight has this name."""
    prefix = first_weight[: -len(FIRST_WEIGHT)]
    experts = [value.float().flatten(1) for name, value in weights.items() if name.startswith(prefix + EXPERTS)]
    num_experts, model_dim, _ = weights[first_weight].shape
    projection = weights.get(prefix + PROJECTION)
    return LayerReport(
        name=prefix[: -len(".fc1.moe")] if prefix.endswith(".fc1.moe") else prefix,
        num_experts=num_experts,
        model_dim=model_dim,
        hidden_dim=weights[prefix + ".experts.weight_out"].size(1),
        parameters=sum(value.numel() for value in experts),
        router_similarity=None if projection is None else mean_cosine(projection.float()),
        expert_similarity=mean_cosine(torch.cat(experts, 1)),
    )


def mean_cosine(rows: Tensor) -> Optional[float]:
    """Mean over pairs of the cosine between rows [N, D]; None for fewer than two rows."""
    if len(rows) < 2:
        return None
    unit = torch.nn.functional.normalize(rows, dim=1)
    return ((unit.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1))).item()


def model_options(state: Dict[str, Any]) -> Any:
    """The model's flags, as attributes."""
    options = state.get("args") or (state.get("cfg") or {}).get("model")
    options = Namespace(**(options if isinstance(options, dict) else vars(options)))
    fill_defaults(options, MoEOptions)  # flags younger than the checkpoint
    return options


def experts_for_a_token(options: Any, layers: List[LayerReport]) -> int:
    """k, as the router has it under these flags; 0 without experts."""
    if not layers:
        return 0
    return build_gate(options.router, 1, layers[0].num_experts, **router_options(options)).top_k


def _matrix_weights(state: Dict[str, Any], stack: str, share: Dict[str, float]) -> float:
    """Weights a token multiplies in a stack: experts by their share, embeddings only as the output projection."""
    total = 0.0
    for name, value in state.items():
        matrix = name.startswith(f"{stack}.") and torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1
        if matrix and "embed" not in name and not (EXPERTS in name and ".bias_" in name):
            total += value.numel() * share.get(name, 1)
    return total


def _experts_of(weights: Dict[str, Tensor], name: str) -> int:
    return weights[name].size(0)


def _has(weights: Dict[str, Tensor], stack: str) -> bool:
    return any(name.startswith(f"{stack}.") for name in weights)


def _updates(state: Dict[str, Any]) -> Optional[int]:
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates")
