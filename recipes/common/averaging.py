"""Averages a run's last checkpoints, which translates better than the last one alone (arXiv 1706.03762, section 6.1)."""

import re
from pathlib import Path
from typing import Any, Dict, List

import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.layout import layout_of
from fairseq_sparsemixer.plugin.checkpoints.reading import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.writing import save_atomically

BY_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")  # checkpoint_EPOCH_UPDATE.pt, from --save-interval-updates


def last_checkpoints(folder: Path, count: int) -> List[Path]:
    """The `count` newest checkpoints written by --save-interval-updates, newest last; all of them if there are fewer."""
    found = [(int(match.group(1)), path) for path in folder.iterdir() for match in [BY_UPDATE.fullmatch(path.name)] if match]
    if not found:
        raise ConfigurationError(f"{folder} has no checkpoint_EPOCH_UPDATE.pt to average; train first")
    return [path for _, path in sorted(found)][-count:]


def average_checkpoints(paths: List[Path], destination: Path) -> None:
    """Write the last checkpoint with the mean of all parameters, in float32, and without optimizer state.

    Raises ConfigurationError if the models differ or a checkpoint is sharded.
    """
    total: Dict[str, Any] = {}
    for path in paths:
        state = read_checkpoint(str(path))
        if layout_of(state)["size"] > 1:
            raise ConfigurationError(f"{path} is one shard; merge it first: fairseq-sparsemixer reshard IN OUT --portable")
        model = state["model"]
        if total and {name: value.shape for name, value in model.items()} != {name: v.shape for name, v in total.items()}:
            raise ConfigurationError(f"{path} has a different model than {paths[0]}; average checkpoints of one run")
        for name, value in model.items():
            if not value.is_floating_point():
                total[name] = value  # counters: keep the last
            elif name in total:
                total[name] += value.float()
            else:
                total[name] = value.to(torch.float32, copy=True)
    for name, value in total.items():
        if value.is_floating_point():
            value /= len(paths)
    save_atomically({**state, "model": total, "last_optimizer_state": None}, str(destination))
