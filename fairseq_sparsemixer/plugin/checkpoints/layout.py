"""Which tensors of a checkpoint count experts in their first dimension, and which rows of them a file holds.

Every checkpoint of a model with experts says so in its entry `expert_parallel`:

    size        G, the files that hold the experts together; 1 in a portable checkpoint
    index       which of them this one is: rows index * E / G and on
    save        a number drawn for each save, the same in all files of it; None when one rank saved alone
    optimizer   the indices of the experts' parameters in the optimizer's state
"""

import copy
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.names import EXPERTS

LAYOUT = "expert_parallel"
COPIES_OF_MODEL = ("ema", "ema_fp32_params")  # in extra_state, by the names of the model's parameters

Combine = Callable[[List[Tensor]], Tensor]


def layout_of(state: Dict[str, Any]) -> Dict[str, Any]:
    """The entry described above; that of a portable checkpoint where there is none."""
    return {"size": 1, "index": 0, "save": None, "optimizer": None, **(state.get(LAYOUT) or {})}


def wrong_layout(state: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """What is wrong with that entry: its name, and what it is; None where nothing is."""
    entry = state.get(LAYOUT)
    if not isinstance(entry, (dict, type(None))):
        return LAYOUT, f"a {type(entry).__name__}, not a dict"
    layout = layout_of(state)
    size, index, save, optimizer = (layout[key] for key in ("size", "index", "save", "optimizer"))
    if type(size) is not int or type(index) is not int or not 0 <= index < size:
        return LAYOUT, f"file {index!r} of {size!r}, which are not numbers that go together"
    if not isinstance(save, (int, type(None))):
        return LAYOUT, f"of save {save!r}, which is not a number"
    if optimizer is not None and not (isinstance(optimizer, list) and all(type(number) is int for number in optimizer)):
        return LAYOUT, f"with the optimizer indices {optimizer!r}, which are not numbers"
    return None


def suffix(index: int) -> str:
    """What the file of rank `index` has before its `.pt`: fairseq's own convention for experts."""
    return f"-rank-{index}"


def shard_path(path: str, index: int) -> str:
    """The file of rank `index` of the sharded checkpoint that is called `path`."""
    stem = path[: -len(".pt")] if path.endswith(".pt") else path
    return f"{stem}{suffix(index)}.pt"


def own_rows(size: int, index: int) -> Combine:
    """A whole expert tensor [E, ...] -> rows [E / G, ...] of rank `index` of `size`, a view."""

    def rows(tensors: List[Tensor]) -> Tensor:
        count = tensors[0].size(0) // size
        return tensors[0].narrow(0, index * count, count)

    return rows


def combine_experts(states: List[Dict[str, Any]], combine: Combine, optimizer: Optional[List[int]] = None) -> Dict[str, Any]:
    """The first of some checkpoints, with each tensor of experts made from those of all of them.

    optimizer: the indices of the experts in the optimizer's state, where the checkpoints do not say.
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
    result = copy.copy(states[0])  # an OrderedDict keeps torch's metadata that way
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
    """Whether a state that an optimizer keeps for experts has a row for each: moments do, the number of steps does not."""
    return torch.is_tensor(value) and value.dim() > 0
