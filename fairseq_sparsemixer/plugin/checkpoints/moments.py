"""Checks that the state that an optimizer loaded fits its parameters; torch compares only their number."""

from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError

# What torch's and fairseq's optimizers keep for each weight; states with other names may have any shape.
MOMENTS = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",  # Adamax
    "momentum_buffer",  # NAG, SGD
    "sum",  # Adagrad
    "square_avg",  # Adadelta
    "acc_delta",
)
FACTORS = ("exp_avg_sq_row", "exp_avg_sq_col")  # Adafactor's, of matrices
WITHOUT_IT = "use another checkpoint, or load only the weights with --reset-optimizer --reset-lr-scheduler --reset-meters"


def refuse_misfits(path: str, optimizer: Any, trained: List[Tuple[str, Tensor]]) -> None:
    """Raise ConfigurationError if a moment in a fairseq optimizer's state is missing or does not have its parameter's shape.

    path: of the checkpoint that the state is from. trained: the names and parameters that the optimizer was built for.
    """
    for one in _single(optimizer):
        parameters = [parameter for group in one.param_groups for parameter in group["params"]]
        entries = {index: one.state[parameter] for index, parameter in enumerate(parameters) if one.state.get(parameter)}
        expected = _expected(entries)
        for index, entry in entries.items():
            problem = _misfit(entry, parameters[index], expected)
            if problem is not None:
                name = _name(index, parameters, trained)
                raise ConfigurationError(f"the optimizer state in {path} does not fit parameter {name}: {problem}; {WITHOUT_IT}")


def _single(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """The torch optimizers of a fairseq optimizer, of which `composite` has several, also within that of half precision."""
    parts = getattr(optimizer.optimizer, "optimizers", None)
    if parts:
        for part in parts.values():
            yield from _single(part)
    else:
        yield optimizer.optimizer


def _name(index: int, parameters: List[Tensor], trained: List[Tuple[str, Tensor]]) -> str:
    """Of the parameter at `index`, which may be a float32 copy of the model's, or all of the model's in one."""
    own = [name for name, parameter in trained if parameter is parameters[index]]
    if not own and len(parameters) == len(trained):
        own = [trained[index][0]]
    return own[0] if own else f"number {index}"


def _expected(entries: Dict[int, Dict[str, Any]]) -> Tuple[str, ...]:
    """The names that every entry must have: those that any has, but Adafactor's, which depend on the shape."""
    names = {name for entry in entries.values() for name in entry}
    return () if names & set(FACTORS) else tuple(sorted(names))


def _misfit(entry: Dict[str, Any], parameter: Tensor, expected: Tuple[str, ...]) -> Optional[str]:
    missing = [name for name in expected if name not in entry]
    if missing:
        return f"it has no {missing[0]}, which others have"
    step = entry.get("step", 0)
    if not isinstance(step, (int, float)) and not (torch.is_tensor(step) and step.numel() == 1):
        return "its step is not a number"
    shape = tuple(parameter.shape)
    shapes = {**{name: shape for name in MOMENTS}, FACTORS[0]: shape[:-1], FACTORS[1]: shape[:-2] + shape[-1:]}
    for name, value in entry.items():
        found = tuple(value.shape) if torch.is_tensor(value) else type(value).__name__
        if value is not None and found != shapes.get(name, found):
            return f"{name} is {found}, not {shapes[name]}"
    return None
