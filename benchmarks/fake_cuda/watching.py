"""Measurements of a run on fake CUDA tensors."""

import contextlib
from collections import Counter
from typing import Callable, Iterator, List
from typing import Counter as CounterOf

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.costs import Kernel
from benchmarks.fake_cuda.traffic import kernel

VIEWS = set(  # and other operations without a kernel launch
    """
    view _unsafe_view reshape expand t transpose slice select unsqueeze squeeze squeeze_ detach alias permute split
    unbind as_strided diagonal lift_fresh empty empty_like new_empty empty_strided new_empty_strided split_with_sizes
    _reshape_alias narrow unfold sym_size set_ chunk resize_ is_same_size _local_scalar_dense
    """.split()
)
WAITING = {"nonzero", "masked_select", "bincount", "_unique2", "_local_scalar_dense"}


class Watch(TorchDispatchMode):
    """Counts kernels (aten ops except views) and waits for the device, and records the most rows of a product.

    answer: the value returned when a number is read from the device.
    """

    def __init__(self, answer: Callable[[], int] = lambda: 1):
        super().__init__()
        self.answer, self.rows = answer, 0
        self.kernels: CounterOf[Kernel] = Counter()
        self.waits: List[str] = []

    @property
    def launches(self) -> CounterOf[str]:
        """The number of launches of each op."""
        totals: CounterOf[str] = Counter()
        for launched, times in self.kernels.items():
            totals[launched.name] += times
        return totals

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in WAITING and any(isinstance(value, torch.Tensor) and value.is_cuda for value in args):
            self.waits.append(name)
        if name == "_local_scalar_dense":
            return self.answer()
        out = func(*args, **kwargs)
        if name == "_to_copy" and out.device.type != args[0].device.type and not kwargs.get("non_blocking"):
            self.waits.append(f"copy from {args[0].device.type} to {out.device.type}")
        results = [value for value in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(value, torch.Tensor)]
        if name not in VIEWS and any(value.is_cuda for value in results):
            self.kernels[kernel(func, args, kwargs, results)] += 1
        if name in ("_grouped_mm", "grouped_product", "mm", "addmm") and args[-2 if name != "addmm" else 1].dim() == 2:
            self.rows = max(self.rows, *(value.size(0) for value in results if value.dim() == 2), 0)
        return out


@contextlib.contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Like torch.autocast for CUDA, which would query the driver."""
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
