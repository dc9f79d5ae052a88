"""What figures were measured on, in words."""

import datetime
import os
import platform
from pathlib import Path

import torch

import fairseq_sparsemixer


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_machine() -> str:
    """Device, versions, date: `AMD EPYC, 2 cores; torch 2.13.0, fairseq-sparsemixer 0.1.0; 2026-11-25`."""
    device = f"{processor()}, {os.cpu_count()} cores"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    versions = f"torch {torch.__version__}, fairseq-sparsemixer {fairseq_sparsemixer.__version__}"
    return f"{device}; {versions}; {datetime.date.today().isoformat()}"
