"""What a training run left in its folder, read for tables and plots.

fairseq writes `train.log` (--log-format json --log-file RUN_DIR/train.log), the moe criterions `load.jsonl`
(--moe-load-file RUN_DIR/load.jsonl).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Dict, Iterator, List, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

TRAIN_LOG = "train.log"
LOAD_LOG = "load.jsonl"


@dataclass
class ExpertLoad:
    """Tokens of each expert. layers: names, L. counts: [(num_updates, [L][E])], each since the entry before it."""

    layers: List[str]
    counts: List[Tuple[int, List[List[int]]]]

    def total(self) -> List[List[float]]:
        """[L][E], the share of each layer's tokens that an expert had in the whole run."""
        sums = [[sum(tokens) for tokens in zip(*rows)] for rows in zip(*(counts for _, counts in self.counts))]
        return [[tokens / max(sum(row), 1) for tokens in row] for row in sums]

    def entropy(self) -> float:
        """Entropy of the layers' loads over log E, mean over layers: 1 when all experts have the same share."""
        rows = self.total()
        entropies = [-sum(p * math.log(p) for p in row if p > 0) / math.log(len(row)) if len(row) > 1 else 1.0 for row in rows]
        return sum(entropies) / len(entropies)


@dataclass
class Run:
    """valid_loss: [(num_updates, loss in bits per token)]; train_loss: as logged on the way; updates: done so far.

    words_per_second (target tokens) and seconds_per_update are medians over the log's intervals: validation, a pause, or another
    program's burst on the machine does not move them. None where the log has no interval.
    """

    name: str
    valid_loss: List[Tuple[int, float]] = field(default_factory=list)
    train_loss: List[float] = field(default_factory=list)
    updates: int = 0
    words_per_second: Optional[float] = None
    seconds_per_update: Optional[float] = None
    load: Optional[ExpertLoad] = None

    def figures(self) -> Dict[str, Any]:
        """The run in a few numbers; None where the logs do not tell."""
        return {
            "run": self.name,
            "updates": self.updates,
            "valid_loss": min((loss for _, loss in self.valid_loss), default=None),
            "words_per_second": self.words_per_second,
            "load_entropy": None if self.load is None else self.load.entropy(),
        }


def read_run(folder: Path) -> Run:
    """The run in folder. Raises ConfigurationError where there is no log of one."""
    path = folder / TRAIN_LOG
    if not path.is_file():
        raise ConfigurationError(
            f"{folder} has no {TRAIN_LOG}; train with --log-format json --log-file {path} --moe-load-file {folder / LOAD_LOG}"
        )
    # by num_updates: fairseq repeats lines, and a resumed run repeats updates
    valid, train, speed, pace = {}, {}, {}, {}
    updates = 0
    for entry in _json_lines(path):
        if "valid_loss" in entry and "valid_num_updates" in entry:
            valid[int(entry["valid_num_updates"])] = float(entry["valid_loss"])
        elif "wps" in entry and "num_updates" in entry:
            done, words = int(entry["num_updates"]), float(entry["wps"])
            updates = max(updates, done)
            train[done] = float(entry["loss"])
            if words > 0:  # fairseq writes 0 where it has not timed yet
                speed[done], pace[done] = words, float(entry["wpb"]) / words
    if not valid and not train:
        raise ConfigurationError(f"{path} holds no figures of a training run; train with --log-format json")
    return Run(
        name=folder.resolve().name,
        valid_loss=sorted(valid.items()),
        train_loss=[train[done] for done in sorted(train)],
        updates=max([updates, *valid]),
        words_per_second=median(speed.values()) if speed else None,
        seconds_per_update=median(pace.values()) if pace else None,
        load=_read_load(folder / LOAD_LOG),
    )


def _read_load(path: Path) -> Optional[ExpertLoad]:
    if not path.is_file():
        return None
    counts, layers = {}, []
    for entry in _json_lines(path):
        counts[entry["num_updates"]], layers = entry["load"], entry["layers"]
    return ExpertLoad(layers, sorted(counts.items())) if counts else None


def _json_lines(path: Path) -> Iterator[Dict[str, Any]]:
    """The JSON objects at the ends of lines; other lines, and one cut short by a kill, are passed over."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            start = line.find("{")
            try:
                entry = json.loads(line[start:]) if start >= 0 else None
            except ValueError:
                continue
            if isinstance(entry, dict):
                yield entry
