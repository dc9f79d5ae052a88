"""The bytes and FLOPs of one aten op, read off the shapes of its arguments and results.

Bytes: every argument is read once from memory and every result written once, as if a kernel's own accesses were cached
perfectly. FLOPs: those of matrix products only; other kernels are limited by bytes.
"""

from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

from benchmarks.costs import Kernel

WRITE_ONLY = set(  # an argument gives the shape or the memory, and is not read
    """
    zero_ fill_ zeros_like ones_like full_like rand_like randn_like new_zeros new_ones new_full bernoulli_ exponential_
    uniform_ normal_ random_
    """.split()
)
SELECTING = {"index_select", "gather", "index", "take", "embedding"}  # read only the selected elements of the first tensor
SCATTERING = {"index_copy_", "scatter_", "index_put_"}  # write only the given elements of the first tensor
IN_TF32 = {"project", "project_backward_tokens", "project_backward_weight"}
TF32X3 = 6  # a product of float32 by three of TF32, which take twice the time of bfloat16 each
GROUPED = {"_grouped_mm", "grouped_product", "grouped_weight_gradient"}
ADDING = {"scatter_add_", "index_add_"}  # as SCATTERING, and read these elements first
IN_THE_TAIL = {"clear_tail", "clear_idle"}  # our ops that touch only what belongs to no token, which a perfect balance lacks
RESULTS = {"out", "grad_input"}  # keyword arguments that are only written


def kernel(func: Any, args: Sequence[Any], kwargs: Dict[str, Any], results: Sequence[Tensor]) -> Kernel:
    """The cost of an op with these arguments and results."""
    name = func.overloadpacket.__name__
    inputs = list(_tensors([*args, *(value for key, value in kwargs.items() if key not in RESULTS)]))
    flops = _flops(name, inputs, results)
    float32 = bool(flops) and name not in IN_TF32 and results[0].dtype == torch.float32
    return Kernel(name, sum(_traffic(name, inputs, results)), flops, float32)


def _traffic(name: str, inputs: List[Tensor], results: Sequence[Tensor]) -> Tuple[int, int]:
    """Bytes read and written."""
    written = sum(map(size, results))
    if name in WRITE_ONLY:
        return 0, written
    if name in IN_THE_TAIL:
        return 0, 0
    if name == "copy_":
        return size(inputs[1]), written
    if name in SELECTING:
        return min(size(inputs[0]), written) + sum(map(size, inputs[1:])), written
    if name in SCATTERING | ADDING:
        touched = inputs[-1].numel() * inputs[0].element_size()
        return sum(map(size, inputs[1:])) + touched * (name in ADDING), touched
    return sum(size(tensor) for tensor in {id(tensor): tensor for tensor in inputs}.values()), written


def _flops(name: str, inputs: List[Tensor], results: Sequence[Tensor]) -> int:
    """Two for each multiplication and addition of a matrix product; 0 for other ops."""
    if name in ("mm", "bmm", "mv"):
        return 2 * inputs[0].numel() * (inputs[1].size(-1) if name != "mv" else 1)
    if name in ("addmm", "baddbmm"):
        return 2 * inputs[1].numel() * inputs[2].size(-1)
    if name in GROUPED:  # [N, A] x [E, A, B] by rows, or [A, N] x [N, B], where each of the N belongs to one group
        return 2 * inputs[0].numel() * inputs[1].size(-1)
    if name in IN_TF32:  # [S, M] x [E, M], or [S, E] x [E or S, M]
        return 2 * TF32X3 * inputs[0].numel() * inputs[1].size(0 if name == "project" else 1)
    return 0


def size(tensor: Tensor) -> int:
    """The bytes of a tensor's distinct elements: an expanded dimension counts once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride()):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
