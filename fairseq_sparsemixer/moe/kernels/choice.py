"""The one place that chooses the layer's kernels, by device, precision, sizes, and what is installed.

- fused kernels: bfloat16 and float16 on compute capability 8.0 and later, with Triton installed and its kernels found right.
  Their grouped product is torch's where it has one, otherwise Triton's.
- torch's grouped product alone: bfloat16 on capability 9 and 10, widths that are multiples of 8, a torch with F.grouped_mm.
- a loop over experts with counts on the host: everything else.

The environment variable SPARSEMIXER_KERNELS=0 turns the fused kernels off.
"""

import contextlib
import importlib.util
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Iterator, Optional

import torch
import torch.nn.functional as F

AMPERE, HOPPER, BLACKWELL = 8, 9, 10  # major compute capabilities
SWITCH = "SPARSEMIXER_KERNELS"
_forced: Optional[bool] = None


@contextlib.contextmanager
def forced(fused: bool) -> Iterator[None]:
    """Use the custom ops, or none, whatever the device and precision: for tests and the cost model."""
    global _forced
    before, _forced = _forced, fused
    try:
        yield
    finally:
        _forced = before


def fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the layer runs the custom ops for rows of this dtype on this device."""
    if _forced is not None:
        return _forced
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or torch.version.hip:
        return False
    return bool(_fused_on(device, dtype))


@torch.compiler.assume_constant_result  # traced code cannot run the check
def _fused_on(device: torch.device, dtype: torch.dtype) -> bool:
    capable = torch.cuda.get_device_capability(device)[0] >= AMPERE
    return capable and os.environ.get(SWITCH) != "0" and has_triton() and is_right(device, dtype)


def can_group(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether torch has a grouped product kernel for these sizes: bfloat16, Hopper or Blackwell, rows of 16 bytes.

    Otherwise torch falls back to a loop over experts, which copies their sizes to the host.
    """
    return (
        hasattr(F, "grouped_mm")
        and device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device)[0] in (HOPPER, BLACKWELL)
        and all(size % 8 == 0 for size in sizes)
    )


def leaves_garbage(device: torch.device) -> bool:
    """Whether torch's product leaves the result of an empty group uninitialised, as on Blackwell (pytorch#172439)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == BLACKWELL


@lru_cache(maxsize=None)
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=None)
def is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels give what PyTorch gives on this device; checked once in a process, and warned of if not."""
    from fairseq_sparsemixer.moe.kernels.self_check import disagreement

    try:
        with ThreadPoolExecutor(1) as fresh:  # autocast and torch's other modes belong to the caller's thread
            found = fresh.submit(disagreement, device, dtype).result()
    except Exception as error:  # whatever it is, PyTorch computes the same
        found = f"{type(error).__name__}: {error}"
    if found:
        warnings.warn(f"The fused kernels are not used on {device} in {dtype}, as they failed their check ({found})")
    return not found
