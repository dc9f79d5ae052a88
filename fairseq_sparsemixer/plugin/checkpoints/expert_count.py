"""Gives a model with experts another number of them: E -> E', by copying or leaving out.

New expert e is a copy of expert floor(e E / E'), together with its router row and its part of the gate's state. Copies have
rows that differ by a millionth, so that an arg-max spreads tokens over them. Whether the new model computes the same is
measured on the gates: with m copies of each expert, it does for k = 1, and for m k experts a token, up to a factor that is
compensated as in upcycling.py.
"""

import argparse
from dataclasses import fields
from typing import Any, Dict, FrozenSet, List, NamedTuple, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Gate, Routing, build_gate
from fairseq_sparsemixer.names import EXPERTS, FIRST_WEIGHT, GATE, transformer_layer
from fairseq_sparsemixer.options import MoEOptions, in_flags
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, refuse_one_of_several
from fairseq_sparsemixer.plugin.checkpoints.merging import refuse_adapters
from fairseq_sparsemixer.plugin.checkpoints.model_settings import in_form_of, model_settings
from fairseq_sparsemixer.plugin.checkpoints.slices import Change, refuse_change, reinitialise
from fairseq_sparsemixer.plugin.models.config import check_numbers
from fairseq_sparsemixer.plugin.models.layer_choice import with_experts
from fairseq_sparsemixer.plugin.models.router_options import router_options

CHANGED = ("num_experts", "moe_top_k")  # the flags that the new model may have
ROW_NOISE = 1e-6  # standard deviation of the difference between the router rows of copies, relative to that of the rows
PROBES = 64  # random tokens on which gates are compared
TOLERANCE = 1e-4  # of a weight's ratio between old and new gate, relative


class Changed(NamedTuple):
    """The new checkpoint, and what its layers do not keep."""

    state: Dict[str, Any]
    notes: List[str]


class Pair(NamedTuple):
    """The gates of a layer before and after, and the old expert of each new one [E']."""

    old: Gate
    new: Gate
    origins: Tensor


def change_experts(state: Dict[str, Any], flags: MoEOptions, change: Change, named: FrozenSet[str] = frozenset()) -> Changed:
    """A checkpoint with experts -> one with flags.num_experts in each layer that has the model's number of them.

    change: noise and new hidden units of experts that are a second copy. named: the flags that were given even if they have
    their default; others with their default are taken for the checkpoint's. Raises ConfigurationError for other flags than the
    checkpoint's, numbers that its router or a layer does not allow, and a sharded checkpoint.
    """
    refuse_one_of_several(state)
    refuse_adapters(state)
    old = options_of(state)
    _require_same(old, flags, named)
    refuse_change(change)
    if change.granularity != 1:
        raise ConfigurationError(f"--granularity {change.granularity} cuts dense layers, but this one has experts; leave it out")
    new = MoEOptions(**{**vars(old), "num_experts": flags.num_experts, "moe_top_k": flags.moe_top_k or old.moe_top_k})
    if new == old:
        raise ConfigurationError(f"the checkpoint already has experts, {old.num_experts} a layer; give another --num-experts")
    check_numbers(new)
    notes: List[str] = []
    extra = state.get("extra_state") or {}
    with in_flags():
        model = _change_model(state["model"], old, new, change, notes)
        copies = {key: _change_model(extra[key], old, new, change, []) for key in COPIES_OF_MODEL if key in extra}
    result = {key: value for key, value in state.items() if key != "last_optimizer_state"}
    result.update(model=model, extra_state={**extra, **copies}, **_settings(state, new))
    return Changed(result, notes)


def options_of(state: Dict[str, Any]) -> MoEOptions:
    """The flags of the checkpoint's experts."""
    settings = model_settings(state)
    return MoEOptions(**{flag.name: settings.get(flag.name, flag.default) for flag in fields(MoEOptions)})


def _require_same(old: MoEOptions, flags: MoEOptions, named: FrozenSet[str]) -> None:
    for flag in fields(MoEOptions):
        given, own = getattr(flags, flag.name), getattr(old, flag.name)
        if flag.name not in CHANGED and given != own and (given != flag.default or flag.name in named):
            name = flag.name.replace("_", "-")
            raise ConfigurationError(
                f"--{name} {given} is not that of the checkpoint, {own}; a checkpoint with experts keeps all flags but"
                " --num-experts and --moe-top-k"
            )


def _settings(state: Dict[str, Any], new: MoEOptions) -> Dict[str, Any]:
    """The entries of a checkpoint that hold its model's settings, with the new ones."""
    values = {**model_settings(state), **{name: getattr(new, name) for name in CHANGED}}
    if state.get("args"):
        return {"args": argparse.Namespace(**values)}
    return {"cfg": {**state["cfg"], "model": in_form_of(state["cfg"]["model"], values)}}


def _change_model(
    weights: Dict[str, Tensor], old: MoEOptions, new: MoEOptions, change: Change, notes: List[str]
) -> Dict[str, Tensor]:
    result = dict(weights)
    numbers = {name[: -len(FIRST_WEIGHT)]: value.size(0) for name, value in weights.items() if name.endswith(FIRST_WEIGHT)}
    if new.num_experts != old.num_experts and old.num_experts not in numbers.values():
        own = ", ".join(map(str, sorted(set(numbers.values()))))
        raise ConfigurationError(f"the checkpoint's layers have their own numbers of experts ({own}), which upcycle keeps")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(change.seed)
        for layer, count in numbers.items():
            if count == old.num_experts:
                result.update(_change_layer(weights, layer, old, new, change, notes))
            else:
                notes.extend(_check_kept(layer, count, old, new))
    return result


def _check_kept(layer: str, count: int, old: MoEOptions, new: MoEOptions) -> List[str]:
    """What a layer that keeps its experts does not keep. Raises ConfigurationError if its router refuses the new --moe-top-k."""
    own = with_experts(new, count)
    build_gate(own.router, 1, count, **router_options(own))
    if new.moe_top_k == old.moe_top_k:
        return []
    return [f"{transformer_layer(layer)} keeps its {count} experts, of which a token gets {new.moe_top_k}: another number"]


def _change_layer(
    weights: Dict[str, Tensor], layer: str, old: MoEOptions, new: MoEOptions, change: Change, notes: List[str]
) -> Dict[str, Tensor]:
    """The new tensors of the MoE layer `layer`."""
    count, gate_prefix = weights[layer + FIRST_WEIGHT].size(0), f"{layer[: -len('.moe')]}{GATE}"
    origins = torch.arange(new.num_experts) * count // new.num_experts
    state = {name[len(gate_prefix) :]: value for name, value in weights.items() if name.startswith(gate_prefix)}
    model_dim = weights[layer + FIRST_WEIGHT].size(1)
    pair = Pair(_gate(old, count, model_dim, state), _gate(new, new.num_experts, model_dim, {}), origins)
    moved = _move_gate(pair, state)
    experts = {
        name: value[origins]
        for name, value in ((n[len(layer + EXPERTS) :], v) for n, v in weights.items() if n.startswith(layer + EXPERTS))
    }
    _vary_copies(experts, origins, change)
    ratio, same = compare(pair)
    if same:
        omega = moved.get("omega")
        for name, value in experts.items() if omega is None else ():
            if name in ("weight_out", "bias_out"):
                value.div_(ratio)
        if omega is not None:
            moved["omega"] = omega / ratio
    else:
        notes.append(f"{transformer_layer(layer)} does not compute the same: a token gets other experts or weights than before")
    return {
        **{f"{layer}{EXPERTS}{name}": value for name, value in experts.items()},
        **{f"{gate_prefix}{name}": value for name, value in moved.items()},
    }


def _gate(options: MoEOptions, num_experts: int, model_dim: int, state: Dict[str, Tensor]) -> Gate:
    own = with_experts(options, num_experts)
    gate = build_gate(own.router, model_dim, num_experts, **router_options(own)).eval()
    gate.load_state_dict({**gate.state_dict(), **{name: value.float() for name, value in state.items()}})
    return gate


def _move_gate(pair: Pair, state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """The state of the new gate; it is also loaded into it."""
    shapes, moved = pair.new.state_dict(), {}
    for name, value in state.items():
        if value.dim() and value.size(0) == pair.old.num_experts and shapes[name].shape != value.shape:
            value = value[pair.origins]
            if name.endswith("weight") and value.dim() > 1:
                value = value + ROW_NOISE * value.std() * torch.randn_like(value) * _is_copy(pair.origins).unsqueeze(1)
        moved[name] = value
    pair.new.load_state_dict({name: value.float() for name, value in moved.items()})
    return moved


def _is_copy(origins: Tensor) -> Tensor:
    """[E']: whether an earlier expert has the same origin."""
    return torch.cat([origins.new_zeros(1, dtype=torch.bool), origins[1:] == origins[:-1]])


def _vary_copies(experts: Dict[str, Tensor], origins: Tensor, change: Change) -> None:
    for expert in _is_copy(origins).nonzero().flatten().tolist():
        for name in ("weight_in", "weight_out") if change.noise else ():
            weight = experts[name][expert]
            weight += change.noise * weight.std() * torch.randn_like(weight)
        reinitialise({name: value[expert] for name, value in experts.items()}, change.reinitialised)


@torch.no_grad()
def compare(pair: Pair) -> Tuple[float, bool]:
    """The ratio of the weights of the new gate to those of the old one, and whether it is the same for all experts and tokens."""
    probes = torch.randn(PROBES, pair.old.model_dim)
    known = {"token_ids": torch.arange(PROBES)} if pair.old.wants_token_ids else {}
    old, new = (gate(probes, **known) for gate in (pair.old, pair.new))
    if old.default is not None:
        return 1.0, False  # default outputs of experts that do not run count, too
    before = _by_expert(old, old.expert_index, pair.old.num_experts)
    after = _by_expert(new, pair.origins[new.expert_index], pair.old.num_experts)
    ratio = float(after.sum() / before.sum())
    return ratio, bool(((after - ratio * before).abs() <= TOLERANCE * ratio * before.max(-1, keepdim=True).values).all())


def _by_expert(routing: Routing, index: Tensor, num_experts: int) -> Tensor:
    """[S, E]: a token's weight for each old expert."""
    weight = routing.combine_weight
    return weight.new_zeros(len(weight), num_experts).scatter_add_(1, index, weight)
