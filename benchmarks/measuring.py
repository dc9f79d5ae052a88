"""Tools shared by the benchmarks: interleaved timing, peak memory, host synchronisations, growth exponents, JSON output."""

import ctypes
import gc
import json
import platform
import time
from datetime import date
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.machine import processor

Step = Callable[[], Any]


class Timing(NamedTuple):
    """The duration of each repetition of a step, in seconds."""

    seconds: List[float]

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / self.median


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_interleaved(steps: Dict[str, Step], rounds: int, warmup: int = 1) -> Dict[str, Timing]:
    """Run every step once per round, so that a temporary disturbance affects all of them."""
    for _ in range(warmup):
        for step in steps.values():
            step()
    seconds: Dict[str, List[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            synchronise()
            start = time.perf_counter()
            step()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(values) for name, values in seconds.items()}


def ratio(timing: Timing, base: Timing) -> float:
    """The median over rounds of the ratio within each round."""
    return median(a / b for a, b in zip(timing.seconds, base.seconds))


def peak_memory(step: Step) -> Optional[int]:
    """The step's peak memory in bytes, beyond what was held before it; None if the system does not report it.

    On a GPU from torch's allocator; on Linux from the kernel's high-water mark of resident memory, which is reset first.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # return the C library's free memory, so that new allocations count
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


class HostSynchronisations:
    """Counts the operations for which the host would wait for a GPU, on any device: `with ... as syncs: ...`."""

    OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "equal"}
    METHODS = {"tolist", "cpu", "numpy"}  # on a CPU, these dispatch no operation

    def __init__(self) -> None:
        self.seen: List[str] = []

    @property
    def count(self) -> int:
        return len(self.seen)

    def __enter__(self) -> "HostSynchronisations":
        seen = self.seen

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func.__name__.split(".")[0]
                if name in HostSynchronisations.OPERATIONS:
                    seen.append(name)
                return func(*args, **(kwargs or {}))

        class Methods(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                name = (resolve_name(func) or "").rsplit(".", 1)[-1]
                if name in HostSynchronisations.METHODS:
                    seen.append(name)
                return func(*args, **(kwargs or {}))

        self.modes = (Operations(), Methods())
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


def growth_exponent(sizes: Sequence[float], values: Sequence[float]) -> Optional[float]:
    """The slope of a least-squares line through (log size, log value); None for fewer than two sizes."""
    if len(set(sizes)) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def hardware() -> Dict[str, Any]:
    """The machine and software on which the figures were measured, with the date."""
    facts = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        return {**facts, "device": torch.cuda.get_device_name()}
    cpu = f"{torch.get_num_threads()} threads of {processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {**facts, "device": f"CPU, {cpu}", "memory_gb": _memory_gb()}


def _memory_gb() -> Optional[float]:
    try:
        line = Path("/proc/meminfo").read_text().splitlines()[0]
        return round(int(line.split()[1]) / 2**20, 1)
    except (OSError, IndexError, ValueError):
        return None


def write_json(path: Path, result: Dict[str, Any]) -> None:
    """Write the result with the hardware it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({"hardware": hardware(), **result}, indent=1) + "\n")
