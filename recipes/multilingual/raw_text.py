"""OPUS-100 (Zhang et al., 2020; arXiv 2004.11867): English and 94 other languages, an archive each, with dev and test sets.

Up to a million training pairs of a language, drawn at random from OPUS. Five more languages have no test set, and are left out.
"""

from itertools import chain, islice
from pathlib import Path
from typing import Dict, Iterable, Iterator, Optional, Sequence

from recipes.common.cldr import tag
from recipes.common.corpus import Pair, clean, read_member, read_pairs
from recipes.common.sources import read_sums

ADDRESS = "https://object.pouta.csc.fi/OPUS-100/v1.0"
SHA256 = read_sums(Path(__file__).with_name("opus100.sha256"))  # of dataset_infos.json in huggingface/datasets, commit 040102f
PARTS = {"train": "train", "valid": "dev", "test": "test"}  # the corpus's names of the splits
UNLIMITED = float("inf")


def pair_of(language: str) -> str:
    """The corpus's name of English and a language, in the order of the alphabet: de-en, en-fr."""
    return "-".join(sorted(("en", language)))


def archive_of(language: str) -> str:
    """The name of a language's archive."""
    return f"opus-100-corpus-{pair_of(language)}-v1.0.tar.gz"


LANGUAGES = sorted(code for name in SHA256 for code in name.split("-")[3:5] if code != "en")


def urls_of(targets: Sequence[str]) -> Dict[str, str]:
    """{archive: address} of the languages."""
    return {archive: f"{ADDRESS}/{archive}" for archive in map(archive_of, targets)}


def read_opus100(folder: Path, targets: Sequence[str], limit: Optional[int] = None) -> Dict[str, Iterable[Pair]]:
    """The splits, English into each of the targets in turn, read while iterated over. Each source begins with its target's tag.

    limit: training pairs of a language. The folder has the archives or their unpacked files. Pairs with an empty side are left
    out, but kept in the test set. Raises ConfigurationError, with file and line, if text is not parallel.
    """
    return {split: _in_turn(folder, targets, split, limit if split == "train" else None) for split in PARTS}


def _in_turn(folder: Path, targets: Sequence[str], split: str, limit: Optional[int]) -> Iterator[Pair]:
    return chain.from_iterable(_tagged(folder, target, split, limit) for target in targets)


def _tagged(folder: Path, target: str, split: str, limit: Optional[int]) -> Iterator[Pair]:
    stem = f"opus-100-corpus/v1.0/supervised/{pair_of(target)}/opus.{pair_of(target)}-{PARTS[split]}"
    sides = (read_member(folder, archive_of(target), f"{stem}.{language}") for language in ("en", target))
    pairs = read_pairs(*sides, may_be_empty=True)
    kept = pairs if split == "test" else clean(pairs, UNLIMITED, UNLIMITED)
    return (Pair(f"{tag(target)} {pair.source}", pair.target) for pair in islice(kept, limit))
