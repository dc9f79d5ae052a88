"""Reports on a checkpoint: its experts, parameters, FLOPs per token, and the similarity of its experts.

Everything is read from the file; no dictionary or model is needed. E experts, M model dimension.
"""

import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE, build_gate
from fairseq_sparsemixer.names import EXPERTS, FIRST_WEIGHT, LAST_WEIGHT, PROJECTION, transformer_layer
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.layout import layout_of
from fairseq_sparsemixer.plugin.checkpoints.reading import read_checkpoint
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults
from fairseq_sparsemixer.plugin.models.fast_path import without_copies
from fairseq_sparsemixer.plugin.models.router_options import router_options

PARTS = ("generator", "encoder", "decoder")
# Embedding tables, of which a token takes one row, and adaptive inputs' projections except the first band's: a word is in one
# band.
NO_MATRIX = re.compile(
    r"\.(embed_tokens|embed_positions|shared\.tokens|shared\.positions|embeddings\.\d+\.0|embeddings\.[1-9]\d*\.1)\.weight$|\.bias\w*$"
)
STATES = (".balancer.bias", ".l1.value", ".average.vectors", ".threshold.value", ".threshold.updates")  # of gates
BUFFERS = (".version", "._float_tensor", *STATES)  # suffixes of state entries that are not parameters
MASKED_LM_HEAD, CLASSIFICATION_HEADS = ".lm_head.", "classification_heads."


@dataclass(frozen=True)
class LayerReport:
    """name: of the transformer layer. router_similarity, expert_similarity: mean cosine over pairs of experts, between their
    rows of the router's projection and between all their weights; None without a projection, and for a single expert.
    """

    name: str
    num_experts: int
    model_dim: int
    hidden_dim: int
    parameters: int
    router_similarity: Optional[float]
    expert_similarity: Optional[float]


@dataclass(frozen=True)
class PartReport:
    """parameters: with all experts. active: those used for one token. flops: of one token's forward pass, two for each
    weight of the matrices that multiply it, without embedding look-ups and the products of queries, keys and values.
    """

    parameters: int
    active: int
    flops: int


@dataclass(frozen=True)
class CheckpointReport:
    """top_k: mean experts per token. parameters, active: see PartReport. parts: encoder and decoder, or ELECTRA's generator
    and discriminator; shared parameters count in both.
    """

    router: str
    top_k: float
    updates: Optional[int]
    parameters: int
    active: int
    parts: Dict[str, PartReport]
    layers: List[LayerReport]


def inspect_checkpoint(path: str) -> CheckpointReport:
    """The report on a fairseq checkpoint. Raises ConfigurationError for an unusable file."""
    state = read_checkpoint(path)
    if layout_of(state)["size"] > 1:
        raise ConfigurationError(
            f"{path} is one file of a sharded checkpoint, without the experts of other ranks;"
            " make one file of all: fairseq-sparsemixer reshard IN OUT --portable"
        )
    model = without_copies(state["model"])
    weights = distinct_tensors(model)
    layers = [layer_report(weights, name) for name in weights if name.endswith(FIRST_WEIGHT)]
    options = model_options(state)
    router = getattr(options, "router", DENSE) if layers else DENSE
    top_k = experts_for_a_token(options, layers)
    total, active = count_weights(weights, top_k)
    return CheckpointReport(
        router=router,
        top_k=top_k,
        updates=_updates(state),
        parameters=total,
        active=active,
        parts=part_reports(model, router, top_k),
        layers=layers,
    )


def distinct_tensors(state: Dict[str, Any]) -> Dict[str, Tensor]:
    """The parameters, each once: a state has tied weights under several names."""
    found: Dict[Any, str] = {}
    for name, value in state.items():
        if torch.is_tensor(value) and value.is_floating_point() and not name.endswith(BUFFERS):
            found.setdefault((value.data_ptr(), value.shape), name)
    return {name: state[name] for name in found.values()}


def layer_report(weights: Dict[str, Tensor], first_weight: str) -> LayerReport:
    """The report of the MoE layer whose experts' first weight has this name."""
    prefix = first_weight[: -len(FIRST_WEIGHT)]
    experts = [value.float().flatten(1) for name, value in weights.items() if name.startswith(prefix + EXPERTS)]
    num_experts, model_dim, _ = weights[first_weight].shape
    projection = weights.get(prefix + PROJECTION)
    return LayerReport(
        name=transformer_layer(prefix),
        num_experts=num_experts,
        model_dim=model_dim,
        hidden_dim=weights[prefix + LAST_WEIGHT].size(1),
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
    """The model's flags as attributes."""
    options = state.get("args") or (state.get("cfg") or {}).get("model")
    options = Namespace(**(options if isinstance(options, dict) else vars(options)))
    fill_defaults(options, MoEOptions)  # for flags newer than the checkpoint
    return options


def experts_for_a_token(options: Any, layers: List[LayerReport]) -> float:
    """The router's k with these flags; 0 without experts."""
    if not layers:
        return 0
    return build_gate(options.router, 1, layers[0].num_experts, **router_options(options)).experts_per_token


def count_weights(weights: Dict[str, Tensor], top_k: float) -> Tuple[int, int]:
    """(total, active) number of weights in distinct tensors."""
    return sum(value.numel() for value in weights.values()), round(_active(weights, top_k))


def part_reports(model: Dict[str, Tensor], router: str, top_k: float) -> Dict[str, PartReport]:
    """The report of each part of this model state."""
    found = {part: {name: value for name, value in model.items() if name.startswith(f"{part}.")} for part in PARTS}
    classifies = any(name.startswith(CLASSIFICATION_HEADS) for name in model)
    reports = {}
    for part, tensors in found.items():
        if tensors:
            title = "discriminator" if part == "encoder" and found["generator"] else part
            flops = 2 * _active(matrices(tensors, router, classifies), top_k)
            reports[title] = PartReport(*count_weights(distinct_tensors(tensors), top_k), round(flops))
    return reports


def matrices(tensors: Dict[str, Tensor], router: str, classifies: bool) -> Dict[str, Tensor]:
    """The tensors that multiply a token in training; a tied one under each of its names.

    classifies: the masked-LM head, still in the file, was replaced by a head that runs once per sentence.
    """
    found = {name: value for name, value in tensors.items() if value.is_floating_point() and value.dim() > 1}
    if router == "hash":  # routes by the token's number, without a projection
        found = {name: value for name, value in found.items() if not name.endswith(PROJECTION)}
    if classifies:
        found = {name: value for name, value in found.items() if MASKED_LM_HEAD not in name}
    return {name: value for name, value in found.items() if not NO_MATRIX.search(name)}


def _active(weights: Dict[str, Tensor], top_k: float) -> float:
    """The number of weights used for one token: those of k of the E experts, and all others."""
    return sum(value.numel() * (top_k / value.size(0) if EXPERTS in name else 1) for name, value in weights.items())


def _updates(state: Dict[str, Any]) -> Optional[int]:
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates")
