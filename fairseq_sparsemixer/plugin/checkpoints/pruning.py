"""Removes experts from a checkpoint: their weights, their rows of the router, and all that a gate keeps per expert.

Inputs are memory-mapped, and the experts that stay are put together in mapped files, as in resharding.
"""

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Gate, build_gate
from fairseq_sparsemixer.names import EXPERTS, FIRST_WEIGHT, GATE, transformer_layer
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, LAYOUT, files_of, number_of_save
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict, in_form_of, model_settings
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for
from fairseq_sparsemixer.plugin.checkpoints.resharding import put_together, read_any
from fairseq_sparsemixer.plugin.checkpoints.upcycling import configuration_of
from fairseq_sparsemixer.plugin.checkpoints.writing import make_folder_of, refuse_special_target, require_targets, save_together
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS, with_experts
from fairseq_sparsemixer.plugin.models.router_options import router_options

NAME = re.compile(r"(encoder|decoder)\.(?:sentence_encoder\.)?layers\.(\d+)")
UNSUITABLE = {  # routers whose experts are not chosen by a score that would choose another one instead
    "base": "which gives every expert the same number of tokens",
    "hash": "which routes by the token's number",
    "round_robin": "which routes by the token's place",
}


@dataclass
class Pruned:
    """The files read and written; before: the experts of each layer; kept: which of them stay; flags: to train the model with."""

    source: List[str]
    target: List[str]
    before: Dict[str, int]
    kept: Dict[str, List[int]]
    flags: str


def parse_keep(text: str) -> float:
    """--keep: a share of the experts as 0.2, 20 % of them; or their number in each layer, 1 or more, as a negative number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    is_share = "." in text and 0 < value <= 1
    if not is_share and not (value >= 1 and value.is_integer() and "." not in text):
        raise ConfigurationError(f"--keep {text} must be a share such as 0.2, or a number of experts such as 4")
    return value if is_share else -value


def choose_experts(scores: Dict[str, List[float]], keep: float, least: int, uneven: bool) -> Dict[str, List[int]]:
    """The experts that stay in each layer, in order: those with the largest scores.

    scores: [E] per layer, comparable between layers. keep: see parse_keep. least: per layer. uneven: the total number is
    that of an even choice, but layers get as many as their scores are worth. Raises ConfigurationError for too many.
    """
    counts = {}
    for layer, own in scores.items():
        wanted = math.ceil(round(keep * len(own), 6)) if keep > 0 else int(-keep)
        if not least <= wanted <= len(own):
            raise ConfigurationError(
                f"--keep leaves {wanted} of the {len(own)} experts of {layer}, where a token uses {least};"
                f" keep {least} to {len(own)}"
            )
        counts[layer] = wanted
    ranked = {layer: sorted(range(len(own)), key=lambda expert: (-own[expert], expert)) for layer, own in scores.items()}
    if uneven:
        total = sum(counts.values())
        rest = [(-scores[layer][expert], layer, expert) for layer, order in ranked.items() for expert in order[least:]]
        chosen = {layer: order[:least] for layer, order in ranked.items()}
        for _, layer, expert in sorted(rest)[: total - least * len(scores)]:
            chosen[layer].append(expert)
        return {layer: sorted(experts) for layer, experts in chosen.items()}
    return {layer: sorted(order[: counts[layer]]) for layer, order in ranked.items()}


def prune(source: str, target: str, scores: Dict[str, List[float]], keep: float, uneven: bool = False, size: int = 1) -> Pruned:
    """Write the checkpoint `source`, one file or sharded, without some of its experts, in `size` files (1: one, portable).

    scores: of the experts by layer, larger ones stay. Optimizer state is left out: it belongs to the larger model. Raises
    ConfigurationError for routers without a score, for scores of another model, and for too few experts.
    """
    refuse_special_target(target)
    states, read = read_any(source)
    with one_sentence_for(source):
        options = _options(states[0])
        before = _experts_of_layers(states)
    _require_scores(source, before, scores)
    least = math.ceil(_gate(options, next(iter(before.values())), 1).experts_per_token)
    kept = choose_experts({layer: scores[layer] for layer in before}, keep, least, uneven)
    for layer, experts in kept.items():
        if size < 1 or len(experts) % size:
            raise ConfigurationError(f"--expert-parallel-size {size} does not divide the {len(experts)} experts kept in {layer}")
    layers = _layer_flags(states[0]["model"], kept)
    written = files_of(target, size)
    make_folder_of(target)
    require_targets(written, read)
    save = number_of_save(size)

    def state_of(index: int) -> Dict[str, Any]:
        with one_sentence_for(source):
            cfg = configuration_of(states[0])
            cfg["model"] = _with_layers(cfg["model"], layers, max(map(len, kept.values())))
            extras = [state.get("extra_state") or {} for state in states]
            choice = {layer: _part(experts, size, index) for layer, experts in kept.items()}

            def cut(models: List[Dict[str, Tensor]]) -> Dict[str, Tensor]:
                return _without_experts(models, options, before, kept, choice, target)

            copies = {key: cut([extra[key] for extra in extras]) for key in COPIES_OF_MODEL if key in extras[0]}
            result = {**states[0], "args": None, "cfg": cfg, "model": cut([state["model"] for state in states])}
            result.update(extra_state={**extras[0], **copies}, last_optimizer_state=None)
            result[LAYOUT] = {"size": size, "index": index, "save": save, "optimizer": None}
            return result

    with writing_checkpoints(written):
        save_together(written, state_of)
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in layers.items())
    return Pruned(read, written, before, kept, f"--num-experts {max(map(len, kept.values()))} {flags}")


def _options(state: Dict[str, Any]) -> Any:
    options = argparse.Namespace(**model_settings(state))
    fill_defaults(options, MoEOptions)
    if options.router in UNSUITABLE:
        raise ConfigurationError(f"the checkpoint has --router {options.router}, {UNSUITABLE[options.router]}; prune another one")
    if (options.router_groups or 1) > 1:
        raise ConfigurationError(f"the checkpoint has --router-groups {options.router_groups}, of equal size; prune another one")
    return options


def _experts_of_layers(states: List[Dict[str, Any]]) -> Dict[str, int]:
    """{layer: E}. Raises ConfigurationError for models without experts, and those whose layers no flag names."""
    names = [name for name in states[0]["model"] if name.endswith(FIRST_WEIGHT)]
    found = {_layer(name, EXPERTS): sum(state["model"][name].size(0) for state in states) for name in names}
    if not found:
        raise ConfigurationError("the checkpoint has no experts to prune")
    for layer in found:
        if not NAME.fullmatch(layer):
            raise ConfigurationError(f"the checkpoint has experts in {layer}, which no flag can give fewer; prune another model")
    return found


def _layer(name: str, part: str) -> str:
    """`encoder.layers.0` of a parameter of this part of its MoE layer."""
    return transformer_layer(name.partition(part)[0]).removesuffix(".fc1")


def _require_scores(source: str, before: Dict[str, int], scores: Dict[str, List[float]]) -> None:
    for layer, count in before.items():
        if len(scores.get(layer, ())) != count:
            found = f"{len(scores[layer])} experts" if layer in scores else "none"
            raise ConfigurationError(
                f"{source} has {count} experts in {layer}, and the load {found}; give the load of this model"
            )


def _gate(options: Any, num_experts: int, model_dim: int) -> Gate:
    with torch.device("meta"):
        own = with_experts(options, num_experts)
        return build_gate(options.router, model_dim, num_experts, **router_options(own))


def _layer_flags(weights: Dict[str, Tensor], kept: Dict[str, List[int]]) -> Dict[str, str]:
    """The layers of each stack with their numbers of experts, as in layer_choice."""
    items: Dict[str, List[str]] = {stack: [] for stack in STACKS if any(name.startswith(f"{stack}.") for name in weights)}
    for match, experts in ((NAME.fullmatch(layer), experts) for layer, experts in kept.items()):
        assert match is not None  # checked by _experts_of_layers
        items[match[1]].append(f"{match[2]}:{len(experts)}")
    return {f"{stack}_moe_layers": ",".join(own) or "none" for stack, own in items.items()}


def _with_layers(model: Any, layers: Dict[str, str], num_experts: int) -> Any:
    return in_form_of(model, {**as_dict(model), **layers, "num_experts": num_experts})


def _part(experts: List[int], size: int, index: int) -> List[int]:
    count = len(experts) // size
    return experts[index * count : (index + 1) * count]


def _without_experts(
    models: List[Dict[str, Tensor]],
    options: Any,
    before: Dict[str, int],
    kept: Dict[str, List[int]],
    choice: Dict[str, List[int]],
    target: str,
) -> Dict[str, Tensor]:
    """The model of all files with the experts `choice` of this file, and the entries of the gates for all that are kept."""
    result = dict(models[0])
    for name in result:
        if EXPERTS in name and _layer(name, EXPERTS) in choice:
            result[name] = _rows([model[name] for model in models], choice[_layer(name, EXPERTS)], target)
        elif GATE in name and _layer(name, GATE) in kept:
            layer = _layer(name, GATE)
            first = next(key for key in result if key.endswith(FIRST_WEIGHT) and _layer(key, EXPERTS) == layer)
            result[name] = _of_gate(result[name], name, options, before[layer], kept[layer], models[0][first].size(1))
    return result


def _rows(shares: List[Tensor], experts: List[int], target: str) -> Tensor:
    """Shares [E / G, ...] of an expert tensor -> the rows of these experts."""
    size = shares[0].size(0)
    return put_together([shares[expert // size][expert % size : expert % size + 1] for expert in experts], target)


def _of_gate(value: Tensor, name: str, options: Any, before: int, kept: List[int], model_dim: int) -> Tensor:
    """An entry of a gate's state with the kept experts along its dimension of experts, if it has one."""
    entry = name.partition(GATE)[2]
    dimension = _dimension_of_experts(options, entry, before, model_dim)
    return value if dimension is None else value.index_select(dimension, torch.tensor(kept))


def _dimension_of_experts(options: Any, entry: str, num_experts: int, model_dim: int) -> Optional[int]:
    """The dimension that differs between gates with this number of experts and with one more; None if none does."""
    one, more = (_gate(options, number, model_dim).state_dict() for number in (num_experts, num_experts + 1))
    differ = [index for index, sizes in enumerate(zip(one[entry].shape, more[entry].shape)) if sizes[0] != sizes[1]]
    return differ[0] if differ else None
