"""Sparse upcycling (Komatsuzaki et al., 2022; arXiv 2212.05055): converts a dense checkpoint to one with experts.

Every expert starts as a copy of the dense layer it replaces, and the router gives all experts the same weight. The new
model then computes the same as the dense one, up to the router's multiplier: 1 / E for Switch and SparseMixer, where all
experts are equally likely. The multiplier is measured on the router and compensated: in SparseMixer's omega, which keeps
the experts on the scale that their optimizer expects, and otherwise in the experts' output layer. So are the factors of
expert and final output masking. With --moe-cmr, the dense layer is also the shared network, and the gate starts at 1/2.
"""

import argparse
import copy
import math
import re
from dataclasses import fields, replace
from typing import Any, Dict, NamedTuple, Optional

import torch
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE, build_gate
from fairseq_sparsemixer.names import CMR, EXPERTS, FIRST_WEIGHT, GATE, LAYER
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL
from fairseq_sparsemixer.plugin.models.config import check_options
from fairseq_sparsemixer.plugin.models.fast_path import without_copies
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, experts_in_layer, with_experts
from fairseq_sparsemixer.plugin.models.moe_block import MoEDecoderLayer, MoEEncoderLayer
from fairseq_sparsemixer.plugin.models.router_options import router_options
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig

WITH_EXPERTS = {"transformer": "transformer_moe", "transformer_moe": "transformer_moe", "transformer_lm": "transformer_lm_moe"}
FEED_FORWARD = re.compile(r"((encoder|decoder)\.layers\.(\d+))\.fc1\.weight")
TIE_BREAK = 1e-6  # scale of the initial logits: enough for an arg-max to spread tokens, too small to change a multiplier
PROBES = 64  # random tokens on which a router's multiplier is measured
TOLERANCE = 1e-5  # relative difference of the multiplier allowed between tokens


class Indifferent(NamedTuple):
    """A gate that gives all experts the same weight, and its multiplier of the sum of k equal experts."""

    gate: nn.Module
    multiplier: float


def upcycle(state: Dict[str, Any], options: MoEOptions, noise: float = 0.0, seed: int = 1) -> Dict[str, Any]:
    """A dense fairseq checkpoint -> one of the model with experts described by `options`, without optimizer state.

    noise: standard deviation of the noise added to each expert's weights, relative to that of the weights; with 0, experts
    differ only by what they learn. Raises ConfigurationError for an unsuitable checkpoint or unsuitable options.
    """
    if any(EXPERTS in name for name in state["model"]):
        raise ConfigurationError("the checkpoint already has experts; upcycle needs a dense one")
    options = replace(options)  # the choice of layers is made explicit in a copy
    check_options(options, _count_layers(state["model"]))
    if options.router == DENSE:
        raise ConfigurationError(f"--router {DENSE} has no experts; choose another router")
    if not 0 <= noise < math.inf:
        raise ConfigurationError(f"--noise {noise} must be at least 0 and finite; give 0 for none")
    cfg = _configuration(state)
    cfg["model"] = _with_experts(cfg["model"], options)
    result = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    result.update(args=None, cfg=cfg, model=_convert(state["model"], options, noise, seed))
    extra = state.get("extra_state") or {}
    _require_fit(cfg["model"], result["model"])
    copies = {key: _convert(extra[key], options, noise, seed) for key in COPIES_OF_MODEL if key in extra}
    result["extra_state"] = {**extra, **copies}
    return result


def _count_layers(weights: Dict[str, Tensor]) -> Dict[str, int]:
    """The number of layers of each stack of a dense model."""
    layers = [name.split(".layers.")[0] for name in weights if FEED_FORWARD.fullmatch(name)]
    return {stack: layers.count(stack) for stack in STACKS if stack in layers}


def _configuration(state: Dict[str, Any]) -> Dict[str, Any]:
    if state.get("cfg"):
        return dict(state["cfg"])
    if state.get("args") is None:
        raise ConfigurationError("the checkpoint does not name its model (it has neither cfg nor args); use another one")
    cfg = convert_namespace_to_omegaconf(copy.deepcopy(state["args"]))  # as fairseq < 0.10 wrote it
    configuration: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    return configuration


def _with_experts(model: Any, options: MoEOptions) -> Any:
    """The configuration of a dense model -> that of the same model with experts. Raises ConfigurationError."""
    values = dict(vars(model) if isinstance(model, argparse.Namespace) else model)
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
    return argparse.Namespace(**values) if isinstance(model, argparse.Namespace) else values


def _require_fit(model: Any, weights: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError if the flags require more in a layer than a dense one provides: shared experts, gates."""
    values = vars(model) if isinstance(model, argparse.Namespace) else model
    cfg = TransformerMoEConfig.from_namespace(argparse.Namespace(**values))
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


def _convert(weights: Dict[str, Tensor], options: MoEOptions, noise: float, seed: int) -> Dict[str, Tensor]:
    """Dense weights by name -> weights with experts in every MoE layer."""
    result, layers = without_copies(weights), _count_layers(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name in sorted(weights):
            feed_forward = FEED_FORWARD.fullmatch(name)
            if feed_forward is None:
                continue
            layer, stack, index = feed_forward.groups()
            num_experts = experts_in_layer(options, stack, int(index), layers[stack])
            if num_experts:
                own = with_experts(options, num_experts)
                indifferent = indifferent_gate(weights[name].size(1), own)
                dense = {part: result.pop(f"{layer}.{part}") for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
                moved = _experts(dense, num_experts, noise)
                _compensate(moved, indifferent, (1 - options.moe_eom) * (1 - options.moe_fom))
                result.update({f"{layer}{LAYER}{EXPERTS}{part}": value for part, value in moved.items()})
                result.update({f"{layer}.fc1{GATE}{part}": value for part, value in indifferent.gate.state_dict().items()})
                if options.moe_cmr:
                    result.update({f"{layer}.fc1{CMR}{part}": value for part, value in _cmr(dense, options.moe_fom).items()})
    return result


def _experts(dense: Dict[str, Tensor], num_experts: int, noise: float) -> Dict[str, Tensor]:
    """fc1 [H, M] and fc2 [M, H] -> the tensors of Experts, num_experts copies of them."""

    def copies(weight: Tensor) -> Tensor:
        stacked = weight.repeat(num_experts, *[1] * weight.dim())
        return stacked + noise * weight.std() * torch.randn_like(stacked) if noise else stacked

    return {
        "weight_in": copies(dense["fc1.weight"].t()),  # [E, M, H]
        "bias_in": dense["fc1.bias"].repeat(num_experts, 1),
        "weight_out": copies(dense["fc2.weight"].t()),  # [E, H, M]
        "bias_out": dense["fc2.bias"].repeat(num_experts, 1),
    }


def _cmr(dense: Dict[str, Tensor], fom: float) -> Dict[str, Tensor]:
    """fc1 [H, M] and fc2 [M, H] -> the tensors of ConditionalRouting, with final output masking compensated."""
    shared = _experts(dense, 1, noise=0)
    for part in ("weight_out", "bias_out"):
        shared[part] = shared[part] / (1 - fom)
    gate = {"gate.weight": torch.zeros_like(dense["fc1.weight"][:1]), "gate.bias": torch.zeros_like(dense["fc1.bias"][:1])}
    return {**{f"shared.{part}": value for part, value in shared.items()}, **gate}


def _compensate(experts: Dict[str, Tensor], indifferent: Indifferent, masked: float) -> None:
    """masked: the factor of output masking at inference."""
    omega: Optional[Tensor] = getattr(indifferent.gate, "omega", None)
    for scaled in [omega.data] if omega is not None else [experts["weight_out"], experts["bias_out"]]:
        scaled.div_(indifferent.multiplier * masked)


def indifferent_gate(model_dim: int, options: MoEOptions) -> Indifferent:
    """A gate of options.router that gives every token the same weight, whichever expert it chooses.

    The gate is unchanged if that already holds (GShard renormalises). Otherwise its logits are tiny, so that an arg-max
    router spreads tokens from the start; or zero for SparseMixer, whose mask compares logits relative to each other (it
    samples, so zero logits spread tokens too). Raises ConfigurationError for a router that weighs tokens unevenly in all
    cases.
    """
    gate = build_gate(options.router, model_dim, options.num_experts, **router_options(options)).eval()
    probes = torch.randn(PROBES, model_dim)
    if gate(probes).default is not None:
        raise ConfigurationError(
            f"--router {options.router} adds running means of the experts' outputs, which a dense checkpoint does not have;"
            " choose another router"
        )
    projection = getattr(gate, "projection", None)
    for size in (None, TIE_BREAK, 0.0):
        if size is not None and projection is not None:
            nn.init.normal_(projection.weight, std=size / model_dim**0.5)
        with torch.no_grad():
            weight = gate(probes).combine_weight.sum(-1)
        if weight.min() > 0 and weight.max() - weight.min() <= TOLERANCE * weight.mean():
            return Indifferent(gate, float(weight.mean()))
    raise ConfigurationError(
        f"--router {options.router} weighs tokens differently even if all experts are equal, so no initialisation equals the"
        " dense model; choose another router"
    )
