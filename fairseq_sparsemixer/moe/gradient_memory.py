"""Gradient buffers of the experts, reused between backward passes.

A gradient of stacked experts takes tens of MB to GB, and fairseq drops gradients between updates. The C library returns
blocks of that size to the system and remaps them in every step, which costs more than computing their content.
"""

import mmap
import sys
from typing import Any, Dict, List, Tuple, Type

import torch
from torch import Tensor

WORTH_KEEPING = 1 << 20  # bytes; glibc never keeps blocks of 32 MB or more, and smaller ones only if no free block follows
BLOCKS = 3  # the gradient of the micro-batches so far, of this one's chunks so far, and of the next chunk


class GradBufferPool:
    """At most BLOCKS blocks per name, reused once no tensor refers to them. CPU only: torch's allocator does this on GPUs."""

    def __init__(self) -> None:
        self._blocks: Dict[str, List[mmap.mmap]] = {}

    def like(self, name: str, parameter: Tensor) -> Tensor:
        """An uninitialised tensor with the parameter's shape and dtype, for its gradient."""
        size = parameter.numel() * parameter.element_size()
        if parameter.device.type != "cpu" or size < WORTH_KEEPING or not hasattr(mmap, "MAP_PRIVATE"):
            return torch.empty_like(parameter)
        # resize_ makes no view: autograd adds in place only to a tensor that alone has its memory
        return torch.frombuffer(self._free_block(name, size), dtype=parameter.dtype).resize_(parameter.shape)

    def _free_block(self, name: str, size: int) -> mmap.mmap:
        blocks = self._blocks.setdefault(name, [])
        if blocks and len(blocks[0]) != size:
            blocks.clear()
        for place in reversed(range(len(blocks))):
            # torch holds a reference to the block while any tensor shares its storage
            if sys.getrefcount(blocks[place]) <= 2:  # the list's and this call's own
                return blocks[place]
        blocks.append(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        del blocks[:-BLOCKS]
        return blocks[-1]

    def __deepcopy__(self, memo: Dict[int, Any]) -> "GradBufferPool":
        return GradBufferPool()

    def __reduce__(self) -> Tuple[Type["GradBufferPool"], Tuple[()]]:
        return GradBufferPool, ()
