"""Multi30k's raw text (English-German): one sentence a line, gzipped or not, `train.en.gz`, `val.de.gz`, ..."""

import gzip
from itertools import zip_longest
from pathlib import Path
from typing import List

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.quickstart.corpus import LANGUAGES, Corpus, Pair

FILES = {"train": "train", "valid": "val", "test": "test_2016_flickr"}


def read_multi30k(folder: Path) -> Corpus:
    """The three splits under folder. Raises ConfigurationError, with file and line, for text that is not parallel."""
    return {split: _read_pairs(folder, name) for split, name in FILES.items()}


def _read_pairs(folder: Path, name: str) -> List[Pair]:
    paths = [_find(folder, f"{name}.{language}") for language in LANGUAGES]
    sides = [_read_lines(path) for path in paths]
    pairs = []
    for number, sentences in enumerate(zip_longest(*sides), start=1):
        for path, sentence in zip(paths, sentences):
            if sentence is None:
                raise ConfigurationError(f"{path} ends before line {number}, where its other side goes on; give equal sides")
            if not sentence:
                raise ConfigurationError(f"{path}, line {number} is empty; take the pair out of both sides")
        pairs.append(Pair(*sentences))
    return pairs


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ConfigurationError(f"RAW={folder} has no {name}.gz; give a folder with {', '.join(FILES.values())} in both languages")


def _read_lines(path: Path) -> List[str]:
    lines: List[str] = []
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line in file:
                lines.append(" ".join(line.decode("utf-8").split()))
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}, line {len(lines) + 1} is not UTF-8; convert the file") from None
    except (OSError, EOFError) as error:
        raise ConfigurationError(f"{path} cannot be read beyond line {len(lines)} ({error}); fetch it again") from None
    return lines
