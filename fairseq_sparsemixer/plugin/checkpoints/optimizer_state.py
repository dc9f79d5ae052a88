"""An optimizer's state for the parameters of one model, as that for those of another which are made from them.

fairseq saves what torch.optim.Optimizer.state_dict gives: `state`, by the index of a parameter, and `param_groups`, here
one. Under --fp16 the parameters are flattened into one, in the same order, unless --fp16-no-flatten-grads.
"""

import math
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor

Entry = Dict[str, Any]  # what an optimizer keeps for one parameter: tensors of its shape, and numbers such as the steps done


class Unmapped(Exception):
    """Why a state cannot be carried over: a clause of a sentence."""


def map_optimizer_state(
    optimizer: Dict[str, Any],
    shapes: Dict[str, torch.Size],
    mapping: Dict[str, List[str]],
    join: Callable[[List[Tensor], str], Tensor],
) -> Dict[str, Any]:
    """The state of a model with parameters `shapes`, in this order -> that of one with parameters `mapping`, in this order.

    mapping: for each new parameter, the old ones that `join(tensors, new name)` makes it from. Raises Unmapped where the
    optimizer keeps something else than tensors of the parameter's shape and numbers, and where numbers that become one differ.
    """
    if len(optimizer["param_groups"]) != 1:
        raise Unmapped(f"it has {len(optimizer['param_groups'])} groups of parameters")
    entries = _by_name(optimizer, shapes)
    state = {}
    for index, (name, old) in enumerate(mapping.items()):
        parts = [entries[part] for part in old if part in entries]
        if parts and len(parts) < len(old):
            raise Unmapped(f"some of the parameters that became {name} were never updated")
        if parts:
            state[index] = _joined(parts, name, join)
    group = {**optimizer["param_groups"][0], "params": list(range(len(mapping)))}
    return {**optimizer, "state": state, "param_groups": [group]}


def _by_name(optimizer: Dict[str, Any], shapes: Dict[str, torch.Size]) -> Dict[str, Entry]:
    """Each parameter's entry; a parameter that never had a gradient has none."""
    state, count = optimizer["state"], len(optimizer["param_groups"][0]["params"])
    if count == len(shapes):
        entries = {name: state[index] for index, name in enumerate(shapes) if index in state}
    elif count == 1 and 0 in state:
        entries = _unflattened(state[0], shapes)
    else:
        raise Unmapped(f"it is for {count} parameters, and the model has {len(shapes)}")
    for name, entry in entries.items():
        if any(_per_weight(value) and value.shape != shapes[name] for value in entry.values()):
            raise Unmapped("this optimizer does not keep one number for each weight")
    return entries


def _unflattened(entry: Entry, shapes: Dict[str, torch.Size]) -> Dict[str, Entry]:
    sizes = [math.prod(shape) for shape in shapes.values()]
    if any(_per_weight(value) and value.shape != (sum(sizes),) for value in entry.values()):
        raise Unmapped(f"it is not for the {sum(sizes):,} numbers that the model has")
    split = {key: value.split(sizes) for key, value in entry.items() if _per_weight(value)}
    return {
        name: {key: split[key][index].view(shape) if key in split else value for key, value in entry.items()}
        for index, (name, shape) in enumerate(shapes.items())
    }


def _joined(parts: List[Entry], name: str, join: Callable[[List[Tensor], str], Tensor]) -> Entry:
    result = {}
    for key, value in parts[0].items():
        values: List[Any] = [part.get(key) for part in parts]
        if _per_weight(value):
            result[key] = join(values, name)
        elif any(other != value for other in values):
            raise Unmapped(f"the parameters that became {name} differ in {key}: some of them had no gradient in some updates")
        else:
            result[key] = value
    return result


def _per_weight(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0
