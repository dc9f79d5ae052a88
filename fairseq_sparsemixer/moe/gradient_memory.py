"""Memory for the gradients of all experts, kept from one backward pass to the next.

A gradient of stacked experts takes tens of MB to GB, and fairseq drops gradients between updates. The C library returns
blocks of that size to the system and maps them anew in every step, which costs more than computing what goes in.
"""

import mmap
import sys
from typing import Any, Dict, Tuple, Type

import torch
from torch import Tensor

WORTH_KEEPING = 1 << 20  # bytes: from 32 MB on glibc never keeps a block, below only where nothing free lies behind it


class GradBufferPool:
    """One block for each name, handed out again as soon as no tensor uses it any more. CPU only: GPUs have an allocator."""

    def __init__(self) -> None:
        self._blocks: Dict[str, mmap.mmap] = {}

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """An uninitialised tensor of a parameter's shape and dtype, for its gradient."""
        size = parameter.numel() * parameter.element_size()
        if parameter.device.type != "cpu" or size < WORTH_KEEPING or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty_like(parameter)
        if name not in self._blocks or len(self._blocks[name]) != size or self._in_use(name):
            self._blocks[name] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(self._blocks[name], dtype=parameter.dtype).view(parameter.shape)

    def _in_use(self, name: str) -> bool:
        # torch holds a reference to the block for as long as any tensor shares the storage made from it
        return sys.getrefcount(self._blocks[name]) > 2  # the dictionary's, and the call's own

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GradBufferPool":
        return GradBufferPool()

    def __reduce__(self) -> Tuple[Type["GradBufferPool"], Tuple[()]]:
        return GradBufferPool, ()
