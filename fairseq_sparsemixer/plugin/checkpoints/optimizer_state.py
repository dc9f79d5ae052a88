"""Maps an optimizer's state from one model's parameters to those of another model built from them.

fairseq saves the result of torch.optim.Optimizer.state_dict: `state`, by parameter index, and `param_groups`, here only
one. With --fp16, the parameters are flattened into one, in the same order, unless --fp16-no-flatten-grads.
"""

import math
from typing import Any, Callable, Dict, List

import torch
from torch import Tensor

Entry = Dict[str, Any]  # an optimizer's state for one parameter: tensors of its shape, and numbers such as the step count


class Unmapped(Exception):
    """The reason why a state cannot be mapped, as a clause of a sentence."""


def map_optimizer_state(
    optimizer: Dict[str, Any],
    shapes: Dict[str, torch.Size],
    mapping: Dict[str, List[str]],
    join: Callable[[List[Tensor], str], Tensor],
) -> Dict[str, Any]:
    """Map the state of a model with parameters `shapes`, in this order, to parameters `mapping`, in this order.

    mapping: for each new parameter, the old ones that `join(tensors, new name)` builds it from. Raises Unmapped if the
    optimizer keeps anything but numbers and tensors of the parameter's shape, or if numbers to be merged differ.
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
    """Each parameter's entry; parameters that never had a gradient have none."""
    state, count = optimizer["state"], len(optimizer["param_groups"][0]["params"])
    if count == len(shapes):
        entries = {name: state[index] for index, name in enumerate(shapes) if index in state}
    elif count == 1 and 0 in state:
        entries = _unflattened(state[0], shapes)
    else:
        raise Unmapped(f"it is for {count} parameters, but the model has {len(shapes)}")
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
