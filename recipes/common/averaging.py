"""Chooses a run's last checkpoints, whose average translates better than the last one alone (arXiv 1706.03762, section 6.1)."""

import re
from pathlib import Path
from typing import List

from fairseq_sparsemixer.errors import ConfigurationError

BY_UPDATE = re.compile(r"checkpoint_\d+_(\d+)\.pt")  # checkpoint_EPOCH_UPDATE.pt, from --save-interval-updates


def last_checkpoints(folder: Path, count: int) -> List[Path]:
    """The `count` newest checkpoints written by --save-interval-updates, newest last; all of them if there are fewer."""
    found = [(int(match.group(1)), path) for path in folder.iterdir() for match in [BY_UPDATE.fullmatch(path.name)] if match]
    if not found:
        raise ConfigurationError(f"{folder} has no checkpoint_EPOCH_UPDATE.pt to average; train first")
    return [path for _, path in sorted(found)][-count:]
