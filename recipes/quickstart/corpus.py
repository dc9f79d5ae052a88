"""Parallel text: pairs by split, checked and written one sentence a line."""

from pathlib import Path
from typing import Dict, List, NamedTuple

LANGUAGES = ("en", "de")  # source, target
SPLITS = ("train", "valid", "test")


class Pair(NamedTuple):
    """A sentence and its translation."""

    source: str
    target: str


Corpus = Dict[str, List[Pair]]  # by split


def write_corpus(corpus: Corpus, folder: Path) -> None:
    """folder/SPLIT.LANGUAGE for each split and language."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in corpus.items():
        for language, sentences in zip(LANGUAGES, zip(*pairs)):
            (folder / f"{split}.{language}").write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
