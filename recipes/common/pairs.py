"""Sentence pairs -> sentencepiece pieces -> binarised data."""

from pathlib import Path
from typing import Any, Callable, Sequence

from rich.console import Console

from recipes.common.binarisation import translation_command
from recipes.common.corpus import LANGUAGES, SPLITS, Corpus, write_corpus
from recipes.common.progress import run_program
from recipes.common.segmentation import learn_pieces, segment_file


def make_data(
    read: Callable[[], Corpus],
    vocabulary: int,
    workers: int,
    folder: Path,
    console: Console,
    languages: Sequence[str] = LANGUAGES,
    **options: Any,
) -> None:
    """Make folder/raw, folder/pieces (one model for both languages) and folder/bin. options: sentencepiece's."""
    raw, pieces = folder / "raw", folder / "pieces"
    corpus = read()
    sizes = write_corpus(corpus, raw, languages)
    first = corpus["test"][0]
    console.print(", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " pairs", highlight=False)
    console.print(f"first test pair: {first.source!r} -> {first.target!r}", highlight=False, markup=False)
    model = learn_pieces([raw / f"train.{language}" for language in languages], pieces, vocabulary, **options)
    for split in SPLITS:
        for language in languages:
            segment_file(model, raw / f"{split}.{language}", pieces / f"{split}.{language}")
    run_program(translation_command(pieces, folder / "bin", workers, languages), folder / "console.log", console)
