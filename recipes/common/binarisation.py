"""fairseq-preprocess on text in subwords."""

from pathlib import Path
from typing import List, Sequence

from recipes.common.corpus import LANGUAGES, SPLITS
from recipes.common.progress import script


def translation_command(pieces: Path, folder: Path, workers: int, languages: Sequence[str] = LANGUAGES) -> List[str]:
    """pieces/SPLIT.LANGUAGE -> folder, with one dictionary for both languages."""
    source, target = languages
    flags = ["--source-lang", source, "--target-lang", target, "--joined-dictionary"]
    return [script("fairseq-preprocess"), *flags, *_rest(pieces, folder, workers)]


def text_command(pieces: Path, folder: Path, workers: int, *flags: str) -> List[str]:
    """pieces/SPLIT -> folder, text of one language."""
    return [script("fairseq-preprocess"), "--only-source", *_rest(pieces, folder, workers), *flags]


def longest_sentence(folder: Path) -> int:
    """The tokens of the longest sentence for training and validation in a binarised folder; 1 where there is none."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    files = [path for split in ("train", "valid") for path in folder.glob(f"{split}.*idx")]
    indices = [MMapIndexedDataset.Index(str(path)) for path in files]  # kept: an index takes its sizes along when it goes
    return max((int(index.sizes.max()) for index in indices), default=1)


def _rest(pieces: Path, folder: Path, workers: int) -> List[str]:
    splits = [word for split in SPLITS for word in (f"--{split}pref", str(pieces / split))]
    return [*splits, "--destdir", str(folder), "--workers", str(workers)]
