"""Describes the machine that figures were measured on, and counts its cores."""

import datetime
import os
import platform
from pathlib import Path

import fairseq_sparsemixer


def processor() -> str:
    """The CPU's name, or its architecture if the system gives no name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def visible_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """visible_cores, or a container's CPU quota in cores if that is lower; torch ignores the quota."""
    cores = visible_cores()
    for read in (_quota_2, _quota_1):
        try:
            quota = read(control_group)
        except (OSError, ValueError):  # another cgroup version, or no cgroups
            continue
        return max(1, min(cores, round(quota)))
    return cores


def _quota_2(folder: Path) -> float:
    quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
    return int(quota) / int(period)  # without a quota it is "max", a ValueError


def _quota_1(folder: Path) -> float:
    quota, period = (int((folder / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii")) for name in ("quota", "period"))
    if quota <= 0:
        raise ValueError("no quota")
    return quota / period


def describe_machine() -> str:
    """Device, versions, date: `AMD EPYC, 2 cores; torch 2.13.0, fairseq-sparsemixer 0.1.0; 2026-11-25`."""
    import torch  # takes seconds to load, and counting cores does not need it

    device = f"{processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    versions = f"torch {torch.__version__}, fairseq-sparsemixer {fairseq_sparsemixer.__version__}"
    return f"{device}; {versions}; {datetime.date.today().isoformat()}"
