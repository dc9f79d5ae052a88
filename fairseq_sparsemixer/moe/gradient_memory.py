"""Gradient buffers of the experts, reused between backward passes.

A gradient of stacked experts takes tens of MB to GB, and fairseq drops gradients between updates. The C library returns
blocks of that size to the system and remaps them in every step, which costs more than computing their content.
"""

import mmap
import sys
from typing import Any, Dict, Tuple, Type

import torch
from torch import Tensor

WORTH_KEEPING = 1 << 20  # bytes; glibc never keeps blocks of 32 MB or more, and smaller ones only if no free block follows


class GradBufferPool:
    """One block per name, reused once no tensor refers to it. CPU only: on GPUs, torch's caching allocator does this."""

    def __init__(self) -> None:
        self._blocks: Dict[str, mmap.mmap] = {}

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """An uninitialised tensor with the parameter's shape and dtype, for its gradient."""
        size = parameter.numel() * parameter.element_size()
        if parameter.device.type != "cpu" or size < WORTH_KEEPING or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty_like(parameter)
        if name not in self._blocks or len(self._blocks[name]) != size or self._in_use(name):
            self._blocks[name] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(self._blocks[name], dtype=parameter.dtype).view(parameter.shape)

    def _in_use(self, name: str) -> bool:
        # torch holds a reference to the block while any tensor shares its storage
        return sys.getrefcount(self._blocks[name]) > 2  # the dictionary's and this call's own

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GradBufferPool":
        return GradBufferPool()

    def __reduce__(self) -> Tuple[Type["GradBufferPool"], Tuple[()]]:
        return GradBufferPool, ()
