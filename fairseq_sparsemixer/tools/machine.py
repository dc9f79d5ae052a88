"""What figures were measured on, in words."""

import datetime
import os
import platform
from pathlib import Path

import fairseq_sparsemixer


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def visible_cores() -> int:
    """Cores that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """visible_cores, or as many as a container's quota of CPU time is worth where that is less: torch does not look at it."""
    cores = visible_cores()
    for read in (_quota_2, _quota_1):
        try:
            quota = read(control_group)
        except (OSError, ValueError):  # another version of control groups, or none
            continue
        return max(1, min(cores, round(quota)))
    return cores


def _quota_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return int(quota) / int(period)  # without a quota it says "max"


def _quota_1(folder: Path) -> float:
    quota, period = (int((folder / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError("no quota")
    return quota / period


def describe_machine() -> str:
    """Device, versions, date: `AMD EPYC, 2 cores; torch 2.13.0, fairseq-sparsemixer 0.1.0; 2026-11-25`."""
    import torch  # takes seconds to load, which what counts cores alone need not wait for

    device = f"{processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    versions = f"torch {torch.__version__}, fairseq-sparsemixer {fairseq_sparsemixer.__version__}"
    return f"{device}; {versions}; {datetime.date.today().isoformat()}"
