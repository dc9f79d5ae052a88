"""What a training run left in its folder, read for tables and plots.

fairseq writes `train.log` (--log-format json --log-file RUN_DIR/train.log), the moe criterions `load.jsonl`
(--moe-load-file RUN_DIR/load.jsonl).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

TRAIN_LOG = "train.log"
LOAD_LOG = "load.jsonl"
LARGEST = 2**53  # of a figure: what is above is a damaged file, and no axis of a plot


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
        """The run in a few numbers; None where the logs do not tell. A loss that is not a number is never the best."""
        return {
            "run": self.name,
            "updates": self.updates,
            "valid_loss": min((loss for _, loss in self.valid_loss if math.isfinite(loss)), default=None),
            "words_per_second": self.words_per_second,
            "load_entropy": None if self.load is None else self.load.entropy(),
        }


def read_run(folder: Path) -> Run:
    """The run in folder. Raises ConfigurationError where there is no log of one, or a figure in it is none."""
    path = folder / TRAIN_LOG
    if not _is_file(path):
        raise ConfigurationError(
            f"{_short(folder)} has no {TRAIN_LOG}; train with --log-format json --log-file RUN_DIR/{TRAIN_LOG}"
            f" --moe-load-file RUN_DIR/{LOAD_LOG}, and give the folder of that run"
        )
    # by num_updates: fairseq repeats lines, and a resumed run repeats updates
    valid, train, speed, pace = {}, {}, {}, {}
    updates = 0
    for entry in _json_lines(path):
        if "valid_loss" in entry.values and "valid_num_updates" in entry.values:
            valid[entry.count("valid_num_updates")] = entry.number("valid_loss")
        elif "wps" in entry.values and "num_updates" in entry.values:
            done, words = entry.count("num_updates"), entry.number("wps")
            updates = max(updates, done)
            train[done] = entry.number("loss")
            if 0 < words < math.inf:  # fairseq writes 0 where it has not timed yet
                speed[done], pace[done] = words, entry.number("wpb") / words
    if not valid and not train:
        raise ConfigurationError(f"{_short(path)} holds no figures of a training run; train with --log-format json")
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
    if not _is_file(path):
        return None
    counts: Dict[int, Any] = {}
    layers: List[str] = []
    shape = None
    for entry in _json_lines(path):
        layers, load = entry.get("layers", _is_names), entry.get("load", _is_load)
        shape = shape or (len(layers), len(load[0]))
        if (len(layers), len(load[0])) != shape or len(load) != len(layers):
            entry.refuse("load", load, f"has not the layers and experts of the lines before, {shape[0]} and {shape[1]}")
        counts[entry.count("num_updates")] = load
    return ExpertLoad(layers, sorted(counts.items())) if counts else None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_load(value: Any) -> bool:
    """Whether it is a list of rows of as many counts each, at least one."""
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)
    return rows and len({len(row) for row in value}) == 1 and all(_is_count(tokens) for row in value for tokens in row)


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST


class _Entry(NamedTuple):
    """A JSON object in a log, and where it stands."""

    place: str
    values: Dict[str, Any]

    def get(self, name: str, good: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if not good(value):
            self.refuse(name, value, "is none that fairseq writes")
        return value

    def number(self, name: str) -> float:
        """A figure, which fairseq writes as text; NaN and infinity, of a training that diverged, are some."""
        value = self.values.get(name)
        try:
            number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        except (ValueError, OverflowError):
            number = None
        if number is None or LARGEST < abs(number) < math.inf:
            self.refuse(name, value, "is not a number that fairseq writes")
        return number

    def count(self, name: str) -> int:
        """A number of updates."""
        number = self.number(name)
        if not (0 <= number <= LARGEST and number == int(number)):
            self.refuse(name, self.values.get(name), "is not a number of updates")
        return int(number)

    def refuse(self, name: str, value: Any, reason: str) -> NoReturn:
        raise ConfigurationError(f"{self.place}: {name} {str(value)[:40]!r} {reason}; correct the line, or take it out")


def _json_lines(path: Path) -> Iterator[_Entry]:
    """The JSON objects at the ends of lines; other lines, and one cut short by a kill, are passed over."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                start = line.find("{")
                try:
                    values = json.loads(line[start:]) if start >= 0 else None
                except (ValueError, RecursionError):
                    continue
                if isinstance(values, dict):
                    yield _Entry(f"{path}:{number}", values)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); give another folder of a run") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _short(path: Path) -> str:
    """A path in a message: no file has a longer one."""
    return str(path)[:300]
