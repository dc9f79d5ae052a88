"""Reads raw text line by line and writes one sentence per line. Errors name the file and line."""

import gzip
import tarfile
import zipfile
import zlib
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import IO, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Sequence, Tuple

from fairseq_sparsemixer.errors import ConfigurationError

LANGUAGES = ("en", "de")  # source, target
SPLITS = ("train", "valid", "test")


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


Corpus = Dict[str, List[Pair]]  # by split


class Lines(NamedTuple):
    """The lines of a file, and its name for messages."""

    name: str
    lines: Iterable[str]


def write_corpus(corpus: Mapping[str, Iterable[Pair]], folder: Path, languages: Sequence[str] = LANGUAGES) -> Dict[str, int]:
    """Write folder/SPLIT.LANGUAGE for each split and language. Returns the number of pairs per split."""
    return {split: write_pairs(pairs, folder, split, languages) for split, pairs in corpus.items()}


def write_pairs(pairs: Iterable[Pair], folder: Path, split: str, languages: Sequence[str] = LANGUAGES) -> int:
    """Write folder/SPLIT.LANGUAGE for both languages, pair by pair. Returns the number of pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = (folder / f"{split}.{language}" for language in languages)
    count = 0
    with source.open("w", encoding="utf-8", newline="\n") as sources, target.open("w", encoding="utf-8", newline="\n") as targets:
        for count, pair in enumerate(pairs, start=1):
            sources.write(pair.source + "\n")
            targets.write(pair.target + "\n")
    return count


def read_split(folder: Path, split: str, languages: Sequence[str] = LANGUAGES) -> Iterator[Pair]:
    """The pairs written by write_pairs."""
    return read_pairs(*(read_file(folder / f"{split}.{language}") for language in languages), may_be_empty=True)


def read_pairs(source: Lines, target: Lines, *, may_be_empty: bool = False) -> Iterator[Pair]:
    """The pairs of two parallel files. Raises ConfigurationError, with file and line, if they are not parallel.

    may_be_empty: accept empty lines, which training text from the web contains; `clean` removes them.
    """
    sides = (source, target)
    for number, sentences in enumerate(zip_longest(source.lines, target.lines), start=1):
        for side, sentence in zip(sides, sentences):
            if sentence is None:
                raise ConfigurationError(f"{side.name} ends before line {number}, but the other side continues; sides must match")
            if not sentence and not may_be_empty:
                raise ConfigurationError(f"{side.name}, line {number} is empty; remove the pair from both sides")
        yield Pair(*sentences)


def find_file(folder: Path, name: str) -> Path:
    """folder/name.gz or folder/name. Raises ConfigurationError if neither exists."""
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ConfigurationError(f"{folder} has no {name}, gzipped or not")


def read_file(path: Path) -> Lines:
    """A file's lines, with whitespace collapsed; decompressed if the name ends in .gz."""
    return Lines(str(path), _decode(str(path), lambda: gzip.open(path) if path.suffix == ".gz" else path.open("rb")))


def read_member(folder: Path, archive: str, member: str) -> Lines:
    """The lines of `member` in folder/archive (tar or zip), or of folder/member if it was unpacked.

    Raises ConfigurationError if neither exists.
    """
    if (folder / member).is_file() or (folder / f"{member}.gz").is_file():
        return read_file(find_file(folder, member))
    path = folder / archive
    if not path.is_file():
        raise ConfigurationError(f"{folder} has neither {archive} nor its {member}; fetch the archive or unpack it there")
    return Lines(f"{path}:{member}", _decode(f"{path}:{member}", lambda: _open_member(path, member)))


@contextmanager
def _open_member(path: Path, member: str) -> Iterator[IO[bytes]]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield file
    else:
        with tarfile.open(path) as tar:
            content = tar.extractfile(member)
            if content is None:
                raise KeyError(f"{member} is not a file")
            yield content


def _decode(name: str, open_file) -> Iterator[str]:
    number = 0
    try:
        with open_file() as file:
            for number, line in enumerate(file, start=1):
                yield " ".join(line.decode("utf-8-sig" if number == 1 else "utf-8").split())
    except UnicodeDecodeError:
        raise ConfigurationError(f"{name}, line {number} is not UTF-8; convert the file") from None
    except (OSError, EOFError, KeyError, tarfile.TarError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(f"{name} cannot be read beyond line {number} ({error}); fetch it again") from None


def clean(pairs: Iterable[Pair], longest: float, ratio: float) -> Iterator[Pair]:
    """The pairs with 1 to `longest` words per side and neither side more than `ratio` times as long as the other."""
    for pair in pairs:
        lengths = [len(sentence.split()) for sentence in pair]
        if min(lengths) >= 1 and max(lengths) <= longest and max(lengths) <= ratio * min(lengths):
            yield pair


def hold_out(pairs: Iterable[Pair], every: int) -> Iterator[Tuple[str, Pair]]:
    """(split, pair) for each pair: every n-th for validation, the others for training."""
    for number, pair in enumerate(pairs, start=1):
        yield ("valid" if number % every == 0 else "train"), pair
