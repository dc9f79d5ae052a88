"""Sentence pairs -> sentencepiece pieces -> binarised data."""

import math
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import Console

from recipes.common.binarisation import translation_command
from recipes.common.corpus import LANGUAGES, Pair, clean, read_file, read_split, write_corpus, write_pairs
from recipes.common.progress import run_program
from recipes.common.segmentation import learn_pieces, segment, segment_file


def make_data(
    read: Callable[[], Mapping[str, Iterable[Pair]]],
    vocabulary: int,
    workers: int,
    folder: Path,
    console: Console,
    languages: Sequence[str] = LANGUAGES,
    longest: float = math.inf,
    **options: Any,
) -> None:
    """Make folder/raw, folder/pieces (one model for both languages) and folder/bin. options: sentencepiece's.

    longest: pieces on either side of a training or validation pair; longer ones are left out.
    """
    raw, pieces = folder / "raw", folder / "pieces"
    sizes = write_corpus(read(), raw, languages)
    first = next(read_split(raw, "test", languages))
    console.print(", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " pairs", highlight=False)
    console.print(f"first test pair: {first.source!r} -> {first.target!r}", highlight=False, markup=False)
    model = learn_pieces([raw / f"train.{language}" for language in languages], pieces, vocabulary, **options)
    for split in ("train", "valid"):
        kept = write_pairs(clean(_segmented(model, raw, split, languages), longest, math.inf), pieces, split, languages)
        if kept < sizes[split]:
            console.print(f"{split}: {kept:,} pairs of at most {longest:,} pieces", highlight=False)
    for language in languages:
        segment_file(model, raw / f"test.{language}", pieces / f"test.{language}")
    run_program(translation_command(pieces, folder / "bin", workers, languages), folder / "console.log", console)


def _segmented(model: Path, raw: Path, split: str, languages: Sequence[str]) -> Iterator[Pair]:
    sides = (segment(model, read_file(raw / f"{split}.{language}").lines) for language in languages)
    return map(Pair, *sides)
