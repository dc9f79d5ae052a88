"""The file of --moe-trace: a JSON line for each token and layer, compressed if its name ends in .gz.

    {"subset": "valid", "updates": 400, "layer": "encoder.layers.0", "sentence": 17, "position": 3, "word": "house",
     "experts": [2], "weights": [0.4321]}

A sentence of a layer is in consecutive positions, from 0. "updates" is there in training alone. Several ranks write a file
each, trace-rank-0.jsonl, trace-rank-1.jsonl, ... for trace.jsonl; reading trace.jsonl reads them all.
"""

import gzip
import json
import logging
import re
import zlib
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, TextIO

from fairseq_sparsemixer.errors import ConfigurationError

logger = logging.getLogger(__name__)

BUFFER = 1 << 20  # characters gathered before they are written; with .gz, a member of the file


class Line(NamedTuple):
    """One token in one layer. updates: the updates done before, -1 outside training. word: None if unknown."""

    subset: str
    updates: int
    layer: str
    sentence: int
    position: int
    word: Optional[str]
    experts: List[int]
    weights: List[float]


def rank_file(path: Path, rank: int) -> Path:
    """The file of one of several ranks: the rank stands before the ending, .gz included."""
    ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
    return path.with_name(f"{path.name[: len(path.name) - len(ending)]}-rank-{rank}{ending}")


def rank_files(path: Path) -> Dict[int, Path]:
    """The existing files of ranks, by rank."""
    before, after = (re.escape(part) for part in rank_file(path, 0).name.rsplit("0", 1))
    names = re.compile(f"{before}(0|[1-9][0-9]*){after}")
    found = {}
    if path.parent.is_dir():
        for other in path.parent.iterdir():
            match = names.fullmatch(other.name)
            if match:
                found[int(match[1])] = other
    return dict(sorted(found.items()))


class TraceWriter:
    """Writes lines to a rank's file. The first one replaces what was at `path`, unless `restart` is called with False.

    Raises ConfigurationError at the start if the file cannot be written. If a later write fails, the command goes on with a
    warning, and nothing more is written.
    """

    def __init__(self, path: str, rank: int = 0, world_size: int = 1):
        self.path, self.rank, self.world_size = Path(path), rank, world_size
        self.file = self.path if world_size == 1 else rank_file(self.path, rank)
        self.buffer: List[str] = []
        self.size = 0
        self.started = self.failed = False
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.open("ab").close()
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"--moe-trace {path} cannot be written ({why}); give another path") from None

    def start(self, resume: bool = False) -> None:
        """Before the first lines: remove an earlier trace, all ranks' files of it, unless a training resumes."""
        if self.started:
            return
        self.started = True
        if resume:
            return
        self.file.write_bytes(b"")
        if self.rank == 0:
            stale = [file for rank, file in rank_files(self.path).items() if rank >= self.world_size or self.world_size == 1]
            for file in [*stale, *([self.path] if self.world_size > 1 else [])]:
                if file.is_file():  # not a folder or a device, such as /dev/null
                    file.unlink()

    def add(self, lines: List[str]) -> None:
        """Write these lines, soon."""
        self.buffer += lines
        self.size += sum(map(len, lines))
        if self.size >= BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write what was added. With .gz, this is a member of its own, so that a killed run leaves whole members."""
        if not self.buffer or self.failed:
            return
        data = "".join(self.buffer).encode("utf-8")
        self.buffer, self.size = [], 0
        try:
            with self.file.open("ab") as file:
                file.write(gzip.compress(data) if self.file.suffix == ".gz" else data)
        except OSError as error:
            self.failed = True
            logger.warning("--moe-trace %s ends here (%s); make room there", self.file, error.strerror)


def read_lines(path: str, flag: str) -> Iterator[Line]:
    """The lines of a trace, of one rank after the other. Raises ConfigurationError, naming `flag`, for an unusable file."""
    files = _files_of(path, flag)
    for file in files:
        number = 0
        try:
            with _open_text(file) as text:
                for number, line in enumerate(text, start=1):
                    yield _parse(line, lambda number=number: f"{flag} {file}, line {number},")  # type: ignore[misc]
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(f"{flag} {file} cannot be read after line {number} ({why}); trace again") from None


def _files_of(path: str, flag: str) -> List[Path]:
    """FILE if it exists, and the files of ranks. Raises ConfigurationError if there are none, or a rank lacks."""
    try:
        ranks = rank_files(Path(path))
        files = [Path(path)] if Path(path).exists() else []
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{flag} {path} cannot be read ({error}); give a file of --moe-trace") from None
    if list(ranks) != list(range(len(ranks))):
        missing = next(rank for rank in range(len(ranks)) if rank not in ranks)
        raise ConfigurationError(f"{flag} {path} lacks {rank_file(Path(path), missing)}; put the files of all ranks there")
    if not files and not ranks:
        raise ConfigurationError(f"{flag} {path} does not exist; write it with --moe-trace {path}")
    return files + list(ranks.values())


def _open_text(file: Path) -> TextIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _parse(text: str, place: Callable[[], str]) -> Line:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _is_line(values):
        raise ConfigurationError(f"{place()} is not a line of --moe-trace; remove it, or trace again")
    return Line(
        values["subset"],
        values.get("updates", -1),
        values["layer"],
        values["sentence"],
        values["position"],
        values["word"],
        values["experts"],
        values["weights"],
    )


def _is_line(values: Dict[str, Any]) -> bool:
    experts, weights, word = values.get("experts"), values.get("weights"), values.get("word", "")
    return (
        isinstance(values.get("subset"), str)
        and isinstance(values.get("layer"), str)
        and (word is None or isinstance(word, str))
        and "word" in values
        and _is_count(values.get("sentence"))
        and _is_count(values.get("position"))
        and _is_count(values.get("updates", 0))
        and isinstance(experts, list)
        and isinstance(weights, list)
        and len(experts) == len(weights)
        and all(_is_count(expert) for expert in experts)
        and all(type(weight) in (int, float) for weight in weights)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
