"""Averages the weights of checkpoints (arXiv 1706.03762, section 6.1), or takes the moving average kept by --store-ema.

Inputs are memory-mapped. The process holds the output's weights, of one rank if sharded, and one tensor in float32.
"""

import os
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, LAYOUT, files_of, layout_of, number_of_save, shard_path
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for
from fairseq_sparsemixer.plugin.checkpoints.resharding import read_any
from fairseq_sparsemixer.plugin.checkpoints.same_function import difference
from fairseq_sparsemixer.plugin.checkpoints.shards import updates
from fairseq_sparsemixer.plugin.checkpoints.writing import refuse_special_target, require_targets, save_together
from fairseq_sparsemixer.plugin.models.fast_path import without_copies

EMA = "ema"  # in extra_state: the model's state dict, averaged over updates
# Floating-point entries that are not weights: a version, a tensor of which only the type matters, a number of updates.
NOT_AVERAGED = ("version", "_float_tensor", ".threshold.updates")

Key = Tuple[Any, ...]


@dataclass
class Averaged:
    """The files read, newest last, and written; the values of the model; whether EMA weights were taken."""

    source: List[str]
    target: List[str]
    values: int
    ema: bool


def average(sources: List[str], target: str, ema: bool = False) -> Averaged:
    """Write the mean of the models of `sources`, each one file or sharded, as `target`, in the layout of the sources.

    Sums are in float32, or float64 for such weights; the output has the types of the inputs. The state of gates is averaged,
    as their weights are; counters and all else come from the checkpoint with most updates. Optimizer state and EMA are left
    out. ema: average the EMA weights instead. Raises ConfigurationError for models that differ, and for NaN and infinity.
    """
    refuse_special_target(target)
    read = sorted(((path, *read_any(path)) for path in sources), key=lambda each: updates(each[1][0]))  # stable
    paths, sets = [path for path, _, _ in read], [states for _, states, _ in read]
    files = [file for _, _, own in read for file in own]
    size = len(sets[0])
    for path, states in zip(paths, sets):
        with one_sentence_for(path):
            _require_same_model(paths[0], sets[0], path, states)
            for state in states if ema else ():
                _require_ema(path, state)
    written = files_of(target, size)
    require_targets(written, files)
    save = number_of_save(size)
    values = [0]

    def state_of(index: int) -> Dict[str, Any]:
        newest = sets[-1][index]
        model = _mean([_weights(states[index], ema) for states in sets], without_copies(newest["model"]), paths)
        values[0] += sum(value.numel() for value in model.values() if torch.is_tensor(value))
        extra = {key: value for key, value in (newest.get("extra_state") or {}).items() if key not in COPIES_OF_MODEL}
        result = {**newest, "model": model, "extra_state": extra, "last_optimizer_state": None}
        if LAYOUT in newest:
            result[LAYOUT] = {**layout_of(newest), "save": save}
        return result

    with writing_checkpoints(written):
        save_together(written, state_of)
    return Averaged(paths, written, values[0], ema)


def _weights(state: Dict[str, Any], ema: bool) -> Dict[str, Any]:
    """The model by name, without the duplicates that fairseq 0.12.2's encoder layers write; ema: with its EMA's values."""
    model = without_copies(state["model"])
    if not ema:
        return model
    averaged = state["extra_state"][EMA]
    return {name: averaged.get(name, value) for name, value in model.items()}  # an EMA may lack buffers


def _require_ema(path: str, state: Dict[str, Any]) -> None:
    averaged = (state.get("extra_state") or {}).get(EMA)
    if not averaged:
        raise ConfigurationError(f"{path} has no EMA weights; train with --store-ema, or leave out --ema")
    for name, value in without_copies(state["model"]).items():
        if name not in averaged and value.is_floating_point() and not name.endswith(NOT_AVERAGED):
            raise ConfigurationError(f"{path} has EMA weights of another model: {name} is missing; use another checkpoint")


def _require_same_model(first_path: str, first: List[Dict[str, Any]], path: str, states: List[Dict[str, Any]]) -> None:
    """Raise ConfigurationError unless two checkpoints have the same layout, settings, names, shapes and types."""
    if len(states) != len(first):
        raise ConfigurationError(
            f"{path} has {len(states)} files and {first_path} {len(first)}; give them the same layout:"
            " fairseq-sparsemixer reshard IN OUT"
        )
    problem = difference(first[0], states[0])
    for one, other in zip(first, states):
        problem = problem or _difference_of_weights(without_copies(one["model"]), without_copies(other["model"]))
    if problem:
        raise ConfigurationError(f"{path} has a different model than {first_path}: {problem}; average checkpoints of one run")


def _difference_of_weights(one: Dict[str, Any], other: Dict[str, Any]) -> Optional[str]:
    for name in sorted(one.keys() | other.keys()):
        kinds = [_kind(model.get(name)) for model in (other, one)]
        if kinds[0] != kinds[1]:
            return f"{name} is {kinds[0]}, not {kinds[1]}"
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "missing"
    return f"{str(value.dtype).replace('torch.', '')} {tuple(value.shape)}"


def _mean(models: List[Dict[str, Tensor]], like: Dict[str, Tensor], paths: List[str]) -> Dict[str, Tensor]:
    """The mean of each tensor, of the type of that in `like`; weights that are tied in all models, in one storage, stay tied."""
    result: Dict[str, Tensor] = {}
    done: Dict[Key, Tensor] = {}
    for name, newest in models[-1].items():
        tensors = [model[name] for model in models]
        if not newest.is_floating_point() or name.endswith(NOT_AVERAGED):
            result[name] = newest
            continue
        key = (newest.shape, newest.stride(), *(value.data_ptr() for value in tensors))
        if key not in done:
            done[key] = _mean_of(tensors, name, paths).to(like[name].dtype)
        result[name] = done[key]
    return result


def _mean_of(tensors: List[Tensor], name: str, paths: List[str]) -> Tensor:
    """In at least float32."""
    for value, path in zip(tensors, paths):
        if not bool(torch.isfinite(value).all()):
            raise ConfigurationError(f"{path} has NaN or infinity in {name}; leave out this checkpoint")
    total = tensors[0].to(torch.promote_types(tensors[0].dtype, torch.float32), copy=True)
    for value in tensors[1:]:
        total += value
    return total.div_(len(tensors))


def require_new(target: str) -> None:
    """Raise ConfigurationError if OUT exists: `average run/checkpoint*.pt` without OUT would name the last input as such."""
    found = next((path for path in (target, shard_path(target, 0)) if os.path.lexists(path)), None)
    if found is not None:
        raise ConfigurationError(f"{found} exists already; the last path is the checkpoint to write: give a new name for it")
