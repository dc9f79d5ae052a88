"""Sparse upcycling (Komatsuzaki et al., 2022; arXiv 2212.05055): converts a dense checkpoint to one with experts.

Every expert starts as a copy of the dense layer it replaces, or of one of its G slices (granular upcycling, arXiv 2410.07524),
and the router gives all experts the same weight. The new model then computes the same as the dense one, up to the router's
multiplier: 1 / E for Switch and SparseMixer, where all experts are equally likely. The multiplier is measured on the router
and compensated: in SparseMixer's omega, which keeps the experts on the scale that their optimizer expects, and otherwise in
the experts' output layer. The factors of expert and final output masking are compensated in the same place. With --moe-cmr,
the dense layer is also the shared network, and the gate starts at 1/2.
"""

import argparse
import copy
import re
from dataclasses import fields, replace
from typing import Any, Dict, List, Optional

import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.names import CMR, EXPERTS, FIRST_WEIGHT, GATE, LAYER
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict, in_form_of
from fairseq_sparsemixer.plugin.checkpoints.slices import AS_IT_IS, Change, make_experts, refuse_change
from fairseq_sparsemixer.plugin.checkpoints.starting_gates import Indifferent, group_gate, indifferent_gate, refuse_granularity
from fairseq_sparsemixer.plugin.models.config import check_options
from fairseq_sparsemixer.plugin.models.fast_path import without_copies
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, experts_in_layer, with_experts
from fairseq_sparsemixer.plugin.models.moe_block import MoEDecoderLayer, MoEEncoderLayer
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig

WITH_EXPERTS = {"transformer": "transformer_moe", "transformer_moe": "transformer_moe", "transformer_lm": "transformer_lm_moe"}
FEED_FORWARD = re.compile(r"((encoder|decoder)\.layers\.(\d+))\.fc1\.weight")


def upcycle(
    state: Dict[str, Any], options: MoEOptions, change: Change = AS_IT_IS, notes: Optional[List[str]] = None
) -> Dict[str, Any]:
    """A dense fairseq checkpoint -> one of the model with experts described by `options`, without optimizer state.

    change: how experts differ from the dense layer; by default, not at all. notes: gets a sentence for each layer that only
    approximates the dense one at the start. Raises ConfigurationError for an unsuitable checkpoint or unsuitable options.
    """
    if any(EXPERTS in name for name in state["model"]):
        raise ConfigurationError("the checkpoint already has experts; upcycle needs a dense one")
    options = replace(options)  # the choice of layers is made explicit in a copy
    check_options(options, _count_layers(state["model"]))
    if options.router == DENSE:
        raise ConfigurationError(f"--router {DENSE} has no experts; choose another router")
    refuse_change(change)
    widths = _experts_by_width(state["model"], options)
    refuse_granularity(change.granularity, options, widths)
    if change.granularity > 1:
        options = replace(options, expert_ffn_embed_dim=next(iter(widths)) // change.granularity)
    cfg = configuration_of(state)
    cfg["model"] = _with_experts(cfg["model"], options)
    result = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    result.update(args=None, cfg=cfg, model=_convert(state["model"], options, change, notes))
    extra = state.get("extra_state") or {}
    _require_fit(cfg["model"], result["model"])
    copies = {key: _convert(extra[key], options, change) for key in COPIES_OF_MODEL if key in extra}
    result["extra_state"] = {**extra, **copies}
    return result


def _experts_by_width(weights: Dict[str, Tensor], options: MoEOptions) -> Dict[int, List[int]]:
    """{H: numbers of experts} of the dense layers that get experts."""
    found: Dict[int, List[int]] = {}
    layers = _count_layers(weights)
    for name in weights:
        feed_forward = FEED_FORWARD.fullmatch(name)
        number = feed_forward and experts_in_layer(options, feed_forward[2], int(feed_forward[3]), layers[feed_forward[2]])
        if number:
            found.setdefault(weights[name].size(0), []).append(number)
    return found


def _count_layers(weights: Dict[str, Tensor]) -> Dict[str, int]:
    """The number of layers of each stack of a dense model."""
    layers = [name.split(".layers.")[0] for name in weights if FEED_FORWARD.fullmatch(name)]
    return {stack: layers.count(stack) for stack in STACKS if stack in layers}


def configuration_of(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of a checkpoint, converted if fairseq < 0.10 wrote them. Raises ConfigurationError if there are none."""
    if state.get("cfg"):
        return dict(state["cfg"])
    if state.get("args") is None:
        raise ConfigurationError("the checkpoint does not name its model (it has neither cfg nor args); use another one")
    cfg = convert_namespace_to_omegaconf(copy.deepcopy(state["args"]))  # as fairseq < 0.10 wrote it
    configuration: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return configuration


def _with_experts(model: Any, options: MoEOptions) -> Any:
    """The configuration of a dense model -> that of the same model with experts. Raises ConfigurationError."""
    values = as_dict(model)
    arch = values.get("arch") or values.get("_name")
    dense = ARCH_MODEL_NAME_REGISTRY.get(arch, arch)
    name = WITH_EXPERTS.get(dense)
    if name not in MODEL_REGISTRY:
        known = ", ".join(dense for dense, moe in WITH_EXPERTS.items() if moe in MODEL_REGISTRY)
        raise ConfigurationError(f"the checkpoint is of the model {arch}; upcycle supports {known}")
    values.update({option.name: getattr(options, option.name) for option in fields(MoEOptions)})
    if "moe_encoder_only" in values:
        values["moe_encoder_only"] = False  # set in a model trained with --router dense
    values["_name"] = name
    if "arch" in values:
        values["arch"] = name
    return in_form_of(model, values)


def _require_fit(model: Any, weights: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if the flags require more in a layer than a dense one provides: shared experts, gates."""
    cfg = TransformerMoEConfig.from_namespace(argparse.Namespace(**as_dict(model)))
    for stack, layer_class in (("encoder", MoEEncoderLayer), ("decoder", MoEDecoderLayer)):
        first = next(
            (name[: -len(FIRST_WEIGHT)] for name in weights if name.startswith(stack) and name.endswith(FIRST_WEIGHT)), None
        )
        if first is not None:
            prefix = f"{first.removesuffix('.moe')}."
            found = {name[len(prefix) :]: value.shape for name, value in weights.items() if name.startswith(prefix + "moe.")}
            own = with_experts(cfg, weights[first + FIRST_WEIGHT].size(0))
            with torch.device("meta"):
                expected = {name: value.shape for name, value in layer_class(own).fc1.state_dict().items()}
            for name in sorted(expected):
                if found.get(name) != expected[name]:
                    raise ConfigurationError(
                        f"the flags require {name} of shape {tuple(expected[name])}, but the dense checkpoint provides"
                        f" {tuple(found[name]) if name in found else 'none'}; leave out the flag that requires it"
                    )


def _convert(
    weights: Dict[str, Tensor], options: MoEOptions, change: Change, notes: Optional[List[str]] = None
) -> Dict[str, Tensor]:
    """Dense weights by name -> weights with experts in every MoE layer."""
    result, layers = without_copies(weights), _count_layers(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(change.seed)
        for name in sorted(weights):
            feed_forward = FEED_FORWARD.fullmatch(name)
            if feed_forward is None:
                continue
            layer, stack, index = feed_forward.groups()
            num_experts = experts_in_layer(options, stack, int(index), layers[stack])
            if num_experts:
                own = with_experts(options, num_experts)
                indifferent = _gate(weights[name].size(1), own, change)
                if notes is not None and indifferent.spread > 0:
                    notes.append(f"{layer} starts as the dense layer up to a factor within {indifferent.spread:.0%} of 1")
                dense = {part: result.pop(f"{layer}.{part}") for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
                moved = make_experts(dense, num_experts, change)
                _compensate(moved, indifferent, (1 - options.moe_eom) * (1 - options.moe_fom))
                result.update({f"{layer}{LAYER}{EXPERTS}{part}": value for part, value in moved.items()})
                result.update({f"{layer}.fc1{GATE}{part}": value for part, value in indifferent.gate.state_dict().items()})
                if options.moe_cmr:
                    result.update({f"{layer}.fc1{CMR}{part}": value for part, value in _cmr(dense, options.moe_fom).items()})
    return result


def _gate(model_dim: int, options: MoEOptions, change: Change) -> Indifferent:
    if change.granularity == 1:
        return indifferent_gate(model_dim, options)
    return group_gate(model_dim, options, change.granularity)


def _cmr(dense: Dict[str, Tensor], fom: float) -> Dict[str, Tensor]:
    """fc1 [H, M] and fc2 [M, H] -> the tensors of ConditionalRouting, with final output masking compensated."""
    shared = make_experts(dense, 1, AS_IT_IS)
    for part in ("weight_out", "bias_out"):
        shared[part] = shared[part] / (1 - fom)
    gate = {"gate.weight": torch.zeros_like(dense["fc1.weight"][:1]), "gate.bias": torch.zeros_like(dense["fc1.bias"][:1])}
    return {**{f"shared.{part}": value for part, value in shared.items()}, **gate}


def _compensate(experts: Dict[str, Tensor], indifferent: Indifferent, masked: float) -> None:
    """masked: the factor of output masking at inference."""
    omega: Optional[Tensor] = getattr(indifferent.gate, "omega", None)
    for scaled in [omega.data] if omega is not None else [experts["weight_out"], experts["bias_out"]]:
        scaled.div_(indifferent.multiplier * masked)
