"""Converts checkpoints of microsoft/SparseMixer's fairseq example to `transformer_moe`.

Its model `switch_transformer` is fairseq's transformer, with each expert stored as two Linears in layers 0, 2, 4, ... of
both stacks. Names within a layer, theirs on the left and ours on the right; [E, ...] is a stack of all experts:

    fc1.E.weight [H, M], fc1.E.bias         fc1.moe.experts.weight_in [E, M, H], fc1.moe.experts.bias_in
    fc2.E.weight [M, H], fc2.E.bias         fc1.moe.experts.weight_out [E, H, M], fc1.moe.experts.bias_out
    gating_network.weight, .bias            fc1.moe.gate.projection.weight, .bias
    router.omega                            fc1.moe.gate.omega

There, layers without experts have an unused gating_network too, which is left out.
"""

import argparse
import re
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional

import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.tasks.translation import TranslationConfig
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, LAYOUT
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict
from fairseq_sparsemixer.plugin.checkpoints.optimizer_state import Unmapped, map_optimizer_state
from fairseq_sparsemixer.plugin.checkpoints.skeleton import BUFFER, build_skeleton
from fairseq_sparsemixer.plugin.models.fast_path import without_copies

ROUTERS = {"sparsemixer": "sparsemixer", "switchgate": "switch"}  # theirs (looked up in lower case) -> ours
OWN_OPTIONS = ("num_experts", "router", "jitter_eps", "load_balancing", "load_balancing_alpha", "gumbel")  # of their task
OWN_METERS = ("load", "balance_loss")  # in their log
MOE_FREQ = 2  # hard-coded in their model

FIRST_EXPERT = re.compile(r"(?:encoder|decoder)\.layers\.\d+\.fc1\.0\.weight")
MOE_PARAMETER = re.compile(r"(?P<layer>(?:encoder|decoder)\.layers\.\d+)\.fc1\.moe\.(?P<part>.+)")
EXPERT_PARTS = {"weight_in": "fc1.{}.weight", "bias_in": "fc1.{}.bias", "weight_out": "fc2.{}.weight", "bias_out": "fc2.{}.bias"}
GATE_PARTS = {
    "projection.weight": "gating_network.weight",
    "projection.bias": "gating_network.bias",
    "omega": "router.omega",
}
UNUSED_ROUTER = re.compile(r".*\.layers\.\d+\.gating_network\.(weight|bias)")  # of a layer without experts


@dataclass
class Converted:
    """The new checkpoint, its MoE options, why the optimizer's state was left out (None: it is included), and more to know.

    training_flags: with which it continues training, beside those of its sizes.
    """

    state: Dict[str, Any]
    options: MoEOptions
    left_out: Optional[str]
    training_flags: str
    notes: List[str] = field(default_factory=list)


def convert(state: Dict[str, Any]) -> Converted:
    """A checkpoint written by microsoft/SparseMixer's example -> one of `transformer_moe` that computes the same.

    Raises ConfigurationError for any other checkpoint.
    """
    _require_their_experts(state["model"])
    cfg = dict(state.get("cfg") or {})
    theirs = _arguments(cfg)
    options = _options(theirs)
    cfg.update(model=_model_arguments(theirs, options), task=_translation(cfg.get("task") or {}))
    if cfg.get("common"):
        cfg["common"] = {**cfg["common"], "user_dir": None}  # the example's folder
    skeleton = build_skeleton(cfg["model"], state["model"])
    mapping = {name: _their_names(name, options.num_experts) for name in skeleton.state_dict()}
    _require_fit(skeleton, mapping, state["model"])
    result = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    result.update(args=None, cfg=cfg, model=_rename(state["model"], mapping), extra_state=_extra(state, mapping))
    trained = [name for name, _ in skeleton.named_parameters()]
    result[LAYOUT] = {"size": 1, "index": 0, "save": None, "optimizer": [i for i, n in enumerate(trained) if EXPERTS in n]}
    tied = skeleton.state_dict().keys() - {*trained, *(name for name, _ in skeleton.named_buffers())}
    left_out = _add_optimizer_state(result, state, {name: mapping[name] for name in trained}, tied)
    flags = (
        f"--arch transformer_moe --router {options.router} --num-experts {options.num_experts}"
        f" --moe-freq {options.moe_freq} --jitter-eps {options.jitter_eps:g} --router-bias"
    )
    return Converted(result, options, left_out, flags)


def join(tensors: List[Tensor], name: str) -> Tensor:
    """Their tensors -> our tensor `name`: transposed and stacked for experts, unchanged otherwise."""
    if EXPERTS not in name:
        return tensors[0]
    return torch.stack([tensor.t() for tensor in tensors])  # t() leaves a bias unchanged


def _require_their_experts(weights: Dict[str, Tensor]) -> None:
    if any(EXPERTS in name and ".moe." in name for name in weights):
        raise ConfigurationError("the checkpoint is already one of fairseq-sparsemixer; fairseq loads it as it is")
    if any(".moe_layer." in name for name in weights):
        raise ConfigurationError(
            "the checkpoint is from fairseq's moe branch, which writes a set of files; name them as one file, without -rank-N"
            " and -shared, such as checkpoint_last.pt"
        )
    if not any(FIRST_EXPERT.fullmatch(name) for name in weights):
        raise ConfigurationError(
            "the checkpoint has no experts as microsoft/SparseMixer's example writes them (encoder.layers.0.fc1.0.weight);"
            " fairseq-sparsemixer upcycle gives experts to a dense one"
        )


def _arguments(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of their model, completed by those of their task."""
    model = as_dict(cfg.get("model") or {})
    arch = model.get("arch") or model.get("_name")
    if not str(arch).startswith("switch_transformer"):
        raise ConfigurationError(
            f"the checkpoint is of the model {arch}; convert supports microsoft/SparseMixer's switch_transformer"
        )
    return {**{name: value for name, value in (cfg.get("task") or {}).items() if name in OWN_OPTIONS}, **model}


def _options(theirs: Dict[str, Any]) -> MoEOptions:
    router = str(theirs.get("router"))
    if router.lower() not in ROUTERS:
        raise ConfigurationError(f"the checkpoint's --router {router} is unknown; convert supports SparseMixer and SwitchGate")
    return MoEOptions(
        router=ROUTERS[router.lower()],
        num_experts=_number(theirs, "num_experts", 0),
        moe_freq=MOE_FREQ,
        jitter_eps=_number(theirs, "jitter_eps", MoEOptions.jitter_eps),
        router_bias=True,
    )


def _number(theirs: Dict[str, Any], name: str, default: Any) -> Any:
    """One of their arguments, converted to the type of its default."""
    value = theirs.get(name, default)
    try:
        return type(default)(value)
    except (TypeError, ValueError, OverflowError):
        flag = name.replace("_", "-")
        raise ConfigurationError(f"the checkpoint's --{flag} {value} is not a number; use an unchanged checkpoint") from None


def _model_arguments(theirs: Dict[str, Any], options: MoEOptions) -> argparse.Namespace:
    kept = {name: value for name, value in theirs.items() if name not in OWN_OPTIONS}
    experts = {option.name: getattr(options, option.name) for option in fields(MoEOptions)}
    named = {"_name": "transformer_moe", "arch": "transformer_moe", "task": "translation", "user_dir": None}
    return argparse.Namespace(**{**kept, **experts, **named})


def _translation(task: Dict[str, Any]) -> Dict[str, Any]:
    """The configuration of their task -> that of fairseq's translation task, which it extends."""
    known = {option.name for option in fields(TranslationConfig)}
    return {**{name: value for name, value in task.items() if name in known}, "_name": "translation"}


def _their_names(name: str, num_experts: int) -> List[str]:
    """The names of their tensors that make up our tensor `name`."""
    found = MOE_PARAMETER.fullmatch(name)
    if found is None:
        return [name]
    layer, (kind, part) = found["layer"], found["part"].split(".", 1)
    if kind == "experts":
        return [f"{layer}.{EXPERT_PARTS[part].format(expert)}" for expert in range(num_experts)]
    return [f"{layer}.{GATE_PARTS[part]}"]


def _require_fit(skeleton: nn.Module, mapping: Dict[str, List[str]], weights: Dict[str, Tensor]) -> None:
    """Raise ConfigurationError unless all of our parameters can be built and all of theirs are used."""
    expected = skeleton.state_dict()
    buffers = {name for name, _ in skeleton.named_buffers()}
    for name, theirs in mapping.items():
        shape = expected[name].shape[1:][::-1] if EXPERTS in name else expected[name].shape  # of one expert, transposed
        for their_name in theirs:
            if name not in buffers and (their_name not in weights or weights[their_name].shape != shape):
                found = f"of {tuple(weights[their_name].shape)}" if their_name in weights else "missing"
                raise ConfigurationError(
                    f"the checkpoint's {their_name} is {found}, but its own arguments require {tuple(shape)};"
                    " it is not a checkpoint of microsoft/SparseMixer's example, or was modified"
                )
    used = {name for theirs in mapping.values() for name in theirs}
    for name in without_copies(weights):
        if not (name in used or UNUSED_ROUTER.fullmatch(name) or BUFFER.fullmatch(name)):
            raise ConfigurationError(
                f"the checkpoint has {name}, which microsoft/SparseMixer's example does not have with the same arguments;"
                " convert would have to leave it out"
            )


def _rename(weights: Dict[str, Tensor], mapping: Dict[str, List[str]]) -> Dict[str, Tensor]:
    """Their weights by name -> ours; fairseq fills in missing buffers."""
    return {
        name: join([weights[their_name] for their_name in theirs], name)
        for name, theirs in mapping.items()
        if all(their_name in weights for their_name in theirs)
    }


def _extra(state: Dict[str, Any], mapping: Dict[str, List[str]]) -> Dict[str, Any]:
    """extra_state with the averaged copies renamed and without the meters of their task, which nothing here updates."""
    extra = dict(state.get("extra_state") or {})
    extra.update({key: _rename(extra[key], mapping) for key in COPIES_OF_MODEL if key in extra})
    if extra.get("metrics"):
        # aggregator -> list of (priority, name, class, state)
        extra["metrics"] = type(extra["metrics"])(
            (name, [meter for meter in meters if meter[1] not in OWN_METERS]) for name, meters in extra["metrics"].items()
        )
    return extra


def _add_optimizer_state(
    result: Dict[str, Any], state: Dict[str, Any], mapping: Dict[str, List[str]], tied: set
) -> Optional[str]:
    """Add the optimizer's state, for our moe_ criterion, to `result`; else return why it is left out."""
    if not state.get("last_optimizer_state"):
        return "the checkpoint has none"
    trained = [name for name in state["model"] if name not in tied and not BUFFER.fullmatch(name)]
    shapes = {name: state["model"][name].shape for name in trained}
    try:
        result["last_optimizer_state"] = map_optimizer_state(state["last_optimizer_state"], shapes, mapping, join)
    except Unmapped as reason:
        return str(reason)
    # fairseq loads the state only for a criterion of the same class
    name = f"moe_{(result['cfg'].get('criterion') or {}).get('_name')}"
    if name in CRITERION_REGISTRY and result.get("optimizer_history"):
        *before, last = result["optimizer_history"]
        result["optimizer_history"] = [*before, {**last, "criterion_name": CRITERION_REGISTRY[name].__name__}]
    return None
