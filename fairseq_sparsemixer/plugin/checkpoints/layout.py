"""The layout of a checkpoint: which tensors have experts as their first dimension, and which of their rows a file holds.

Every checkpoint of a model with experts records it in its entry `expert_parallel`:

    size        G, the number of files that together hold the experts; 1 in a portable checkpoint
    index       of this file among them: it holds the E / G rows from index * E / G
    save        a random number per save, the same in all its files; None if one rank saved alone
    optimizer   the indices of the experts' parameters in the optimizer's state
"""

import copy
import os
import secrets
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS

LAYOUT = "expert_parallel"
COPIES_OF_MODEL = ("ema", "ema_fp32_params")  # in extra_state, keyed by the model's parameter names

Combine = Callable[[List[Tensor]], Tensor]


def layout_of(state: Dict[str, Any]) -> Dict[str, Any]:
    """The entry described above; if missing, that of a portable checkpoint."""
    return {"size": 1, "index": 0, "save": None, "optimizer": None, **(state.get(LAYOUT) or {})}


def wrong_layout(state: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """The entry's name and what is wrong with it; None if it is valid."""
    entry = state.get(LAYOUT)
    if not isinstance(entry, (dict, type(None))):
        return LAYOUT, f"a {type(entry).__name__}, not a dict"
    layout = layout_of(state)
    size, index, save, optimizer = (layout[key] for key in ("size", "index", "save", "optimizer"))
    if type(size) is not int or type(index) is not int or not 0 <= index < size:
        return LAYOUT, f"file {index!r} of {size!r}, which is not a valid pair of numbers"
    if not isinstance(save, (int, type(None))):
        return LAYOUT, f"of save {save!r}, which is not a number"
    if optimizer is not None and not (isinstance(optimizer, list) and all(type(number) is int for number in optimizer)):
        return LAYOUT, f"with the optimizer indices {optimizer!r}, which are not numbers"
    return None


def wrong_copy(state: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """The name of a copy of the model and what is wrong with it; None if its tensors have the shapes of the model's."""
    for key in COPIES_OF_MODEL:
        copied = (state.get("extra_state") or {}).get(key, {})
        if not isinstance(copied, dict):
            return key, "not a dictionary of tensors"
        for name, value in copied.items():
            shape, own = getattr(value, "shape", None), getattr(state["model"].get(name), "shape", None)
            if name in state["model"] and shape != own:
                return key, f"of another model: {name} is {shape and tuple(shape)}, not {own and tuple(own)}"
    return None


def suffix(index: int) -> str:
    """The suffix before `.pt` in the file name of rank `index`: fairseq's own convention for experts."""
    return f"-rank-{index}"


def shard_path(path: str, index: int) -> str:
    """The file of rank `index` of the sharded checkpoint `path`."""
    stem = path[: -len(".pt")] if path.endswith(".pt") else path
    return f"{stem}{suffix(index)}.pt"


def in_several_files(path: str) -> bool:
    """Whether `path` names no file, but a sharded checkpoint by what the names of its files have in common."""
    return not os.path.exists(path) and os.path.exists(shard_path(path, 0))


def files_of(path: str, size: int) -> List[str]:
    """The files of the checkpoint `path` in `size` parts; 1: the file itself."""
    return [path] if size == 1 else [shard_path(path, index) for index in range(size)]


def number_of_save(size: int) -> Optional[int]:
    """A new `save` for a checkpoint of `size` files that one process writes."""
    return None if size == 1 else secrets.randbits(62)


def refuse_one_of_several(state: Dict[str, Any]) -> None:
    """Raise ConfigurationError for one file of a sharded checkpoint."""
    if layout_of(state)["size"] > 1:
        raise ConfigurationError(
            "the checkpoint is one file of a sharded one; make one file: fairseq-sparsemixer reshard IN OUT --portable"
        )


def own_rows(size: int, index: int) -> Combine:
    """A whole expert tensor [E, ...] -> a view of the rows [E / G, ...] of rank `index` of `size`."""

    def rows(tensors: List[Tensor]) -> Tensor:
        count = tensors[0].size(0) // size
        return tensors[0].narrow(0, index * count, count)

    return rows


def combine_experts(states: List[Dict[str, Any]], combine: Combine, optimizer: Optional[List[int]] = None) -> Dict[str, Any]:
    """The first of several checkpoints, with each expert tensor combined from those of all.

    optimizer: the indices of the experts in the optimizer's state, if the checkpoints do not record them.
    """
    indices = layout_of(states[0])["optimizer"] if optimizer is None else optimizer
    result = dict(states[0])
    result["model"] = _combine_by_name([state["model"] for state in states], combine)
    extras = [state.get("extra_state") or {} for state in states]
    result["extra_state"] = {
        **extras[0],
        **{key: _combine_by_name([e[key] for e in extras], combine) for key in COPIES_OF_MODEL if key in extras[0]},
    }
    if result.get("last_optimizer_state"):
        optimizers = [state["last_optimizer_state"] for state in states]
        result["last_optimizer_state"] = {**optimizers[0], "state": _combine_by_index(optimizers, indices or [], combine)}
    return result


def _combine_by_name(states: List[Dict[str, Tensor]], combine: Combine) -> Dict[str, Tensor]:
    result = copy.copy(states[0])  # copy.copy keeps torch's metadata on an OrderedDict
    for name in result:
        if EXPERTS in name:
            result[name] = combine([state[name] for state in states])
    return result


def _combine_by_index(optimizers: List[Dict[str, Any]], indices: List[int], combine: Combine) -> Dict[int, Dict[str, Any]]:
    result = dict(optimizers[0]["state"])
    for index in indices:
        if index in result:
            each = [optimizer["state"][index] for optimizer in optimizers]
            result[index] = {
                name: combine([state[name] for state in each]) if counts_experts(value) else value
                for name, value in each[0].items()
            }
    return result


def counts_experts(value: Any) -> bool:
    """Whether a value in the experts' optimizer state has a row per expert: moments do, the step count does not."""
    return torch.is_tensor(value) and value.dim() > 0
