"""Reads the logs of a training run for tables and plots.

fairseq writes `train.log` (--log-format json --log-file RUN_DIR/train.log), and the moe criterions write `load.jsonl`
(--moe-load-file RUN_DIR/load.jsonl).
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, NoReturn, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.language_table import UNTAGGED, LanguageLoad

TRAIN_LOG = "train.log"
LOAD_LOG = "load.jsonl"
LARGEST = 2**53  # larger figures mean a damaged file, and could not be plotted


@dataclass
class ExpertLoad:
    """Tokens per expert. layers: the L names. counts: [(num_updates, [L][E])], each since the previous entry.

    languages: the tokens by language over the same time; None if not recorded (--moe-load-languages).
    """

    layers: List[str]
    counts: List[Tuple[int, List[List[int]]]]
    languages: Optional[LanguageLoad] = None

    def total(self) -> List[List[float]]:
        """[L][E], each expert's share of its layer's tokens over the whole run."""
        sums = [[sum(tokens) for tokens in zip(*rows)] for rows in zip(*(counts for _, counts in self.counts))]
        return [[tokens / max(sum(row), 1) for tokens in row] for row in sums]

    def entropy(self) -> float:
        """Entropy of per-expert token shares / log E (1 = balanced), mean over layers."""
        rows = self.total()
        entropies = [-sum(p * math.log(p) for p in row if p > 0) / math.log(len(row)) if len(row) > 1 else 1.0 for row in rows]
        return sum(entropies) / len(entropies)


@dataclass
class Run:
    """valid_loss: [(num_updates, loss in bits per token)]. train_loss: as logged. updates: done so far.

    words_per_second (target tokens) and seconds_per_update are medians over the log's intervals, so that validation, a pause or
    a burst of other load does not change them. None if the log has no interval.
    """

    name: str
    valid_loss: List[Tuple[int, float]] = field(default_factory=list)
    train_loss: List[float] = field(default_factory=list)
    updates: int = 0
    words_per_second: Optional[float] = None
    seconds_per_update: Optional[float] = None
    load: Optional[ExpertLoad] = None

    def figures(self) -> Dict[str, Any]:
        """Summary figures of the run; None if not in the logs. A NaN or infinite loss is never the best."""
        return {
            "run": self.name,
            "updates": self.updates,
            "valid_loss": min((loss for _, loss in self.valid_loss if math.isfinite(loss)), default=None),
            "words_per_second": self.words_per_second,
            "load_entropy": None if self.load is None else self.load.entropy(),
        }


def read_run(folder: Path) -> Run:
    """Read the run in folder. Raises ConfigurationError if there is no log, or if it has an invalid figure."""
    path = folder / TRAIN_LOG
    if not _is_file(path):
        raise ConfigurationError(
            f"{_short(folder)} has no {TRAIN_LOG}; train with --log-format json --log-file RUN_DIR/{TRAIN_LOG}"
            f" --moe-load-file RUN_DIR/{LOAD_LOG}, and give that run's folder"
        )
    # keyed by num_updates: fairseq repeats lines, and a resumed run repeats updates
    valid, train, speed, pace = {}, {}, {}, {}
    updates = 0
    for entry in _json_lines(path):
        if "valid_loss" in entry.values and "valid_num_updates" in entry.values:
            valid[entry.count("valid_num_updates")] = entry.number("valid_loss")
        elif "wps" in entry.values and "num_updates" in entry.values:
            done, words = entry.count("num_updates"), entry.number("wps")
            updates = max(updates, done)
            train[done] = entry.number("loss")
            if 0 < words < math.inf:  # fairseq writes 0 before its first timing
                speed[done], pace[done] = words, entry.number("wpb") / words
    if not valid and not train:
        raise ConfigurationError(f"{_short(path)} has no figures of a training run; train with --log-format json")
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
    return read_load(path) if _is_file(path) else None


def read_load(path: Path) -> Optional[ExpertLoad]:
    """Read a --moe-load-file; None if it has no line yet. Raises ConfigurationError for a file or figure that is invalid."""
    counts: Dict[int, Any] = {}
    by_language: Dict[int, Dict[str, List[List[int]]]] = {}
    layers: List[str] = []
    shape: Optional[List[int]] = None  # experts of each layer
    for entry in _json_lines(path):
        layers, load = entry.get("layers", _is_names), entry.get("load", _is_load)
        shape = shape or [len(row) for row in load]
        if [len(row) for row in load] != shape or len(load) != len(layers):
            entry.refuse("load", load, f"does not have the {len(shape)} layers and {_span(shape)} experts of earlier lines")
        updates = entry.count("num_updates")
        counts[updates] = load
        by_language.pop(updates, None)  # a resumed run repeats updates
        if "languages" in entry.values:
            by_language[updates] = _language_lines(entry, shape)
    if not counts:
        return None
    return ExpertLoad(layers, sorted(counts.items()), _sum_by_language(layers, shape or [], list(by_language.values())))


def _language_lines(entry: "_Entry", shape: List[int]) -> Dict[str, List[List[int]]]:
    """{language: [L][E]} of a line."""
    names = entry.get("languages", lambda value: value == [] or _is_names(value))
    load = entry.get(
        "language_load", lambda value: isinstance(value, list) and all(rows == [] or _is_load(rows) for rows in value)
    )
    if len(load) != len(shape) or any([len(row) for row in rows] != [size] * len(names) for rows, size in zip(load, shape)):
        entry.refuse("language_load", load, f"does not have {len(names)} languages in each of the {len(shape)} layers")
    return {name: [rows[index] for rows in load] for index, name in enumerate(names)}


def _sum_by_language(layers: List[str], shape: List[int], lines: List[Dict[str, List[List[int]]]]) -> Optional[LanguageLoad]:
    """The sum over lines, which may lack languages that had no token; None without languages."""
    names = sorted({name for line in lines for name in line})
    if not names:
        return None
    counts = [[[0] * size for _ in names] for size in shape]
    for line in lines:
        for row, name in enumerate(names):
            for layer, added in enumerate(line.get(name, ())):
                counts[layer][row] = [before + more for before, more in zip(counts[layer][row], added)]
    return LanguageLoad(layers, [name or UNTAGGED for name in names], counts)


def _span(counts: List[int]) -> str:
    """One number if all are the same, otherwise the range."""
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _is_load(value: Any) -> bool:
    """Whether the value is a list of rows of counts, and none is empty."""
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)
    return rows and all(_is_count(tokens) for row in value for tokens in row)


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= LARGEST


class _Entry(NamedTuple):
    """A JSON object in a log, and its place: file and line number."""

    place: str
    values: Dict[str, Any]

    def get(self, name: str, good: Callable[[Any], bool]) -> Any:
        value = self.values.get(name)
        if not good(value):
            self.refuse(name, value, "is not what fairseq writes")
        return value

    def number(self, name: str) -> float:
        """A figure, which fairseq writes as text; NaN and infinity, from a diverged training, are valid."""
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
        raise ConfigurationError(f"{self.place}: {name} {str(value)[:40]!r} {reason}; correct the line, or remove it")


def _json_lines(path: Path) -> Iterator[_Entry]:
    """The JSON objects at the ends of lines; other lines, and one truncated by a kill, are skipped."""
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
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); give another run's folder") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
        return False


def _short(path: Path) -> str:
    """A path for a message, shortened."""
    return str(path)[:300]
