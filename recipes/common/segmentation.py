"""Subword segmentation with sentencepiece."""

from pathlib import Path
from typing import Any, Iterable, Iterator, List, Sequence

import sentencepiece

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import read_file

MODEL = "pieces.model"  # file name in the folder of a segmented corpus
BATCH = 10_000  # sentences segmented at a time


def learn_pieces(files: Sequence[Path], folder: Path, vocabulary: int, kind: str = "unigram", **options: Any) -> Path:
    """Learn folder/pieces.model with `vocabulary` pieces from text files. kind: unigram or bpe; options: sentencepiece's.

    Raises ConfigurationError, with sentencepiece's reason, if that many pieces cannot be learnt from the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / MODEL
    try:
        sentencepiece.SentencePieceTrainer.train(
            input=[str(path) for path in files],
            model_prefix=str(model.with_suffix("")),
            model_type=kind,
            vocab_size=vocabulary,
            hard_vocab_limit=False,  # a small corpus may have fewer
            minloglevel=2,
            **{"character_coverage": 1.0, **options},
        )
    except RuntimeError as error:
        what = f"cannot learn {vocabulary} pieces from {', '.join(map(str, files))}"
        raise ConfigurationError(f"{what} ({error}); use more pieces or more text") from None
    return model


def segment(model: Path, sentences: Iterable[str]) -> Iterator[str]:
    """Each sentence as pieces separated by spaces; lazy, in batches."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    batch: List[str] = []
    for sentence in sentences:
        batch.append(sentence)
        if len(batch) == BATCH:
            yield from (" ".join(pieces) for pieces in processor.encode(batch, out_type=str))
            batch = []
    yield from (" ".join(pieces) for pieces in processor.encode(batch, out_type=str))


def segment_file(model: Path, source: Path, destination: Path) -> None:
    """Segment the sentences of `source` into `destination`."""
    with destination.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in segment(model, read_file(source).lines))
