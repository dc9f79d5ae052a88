"""fairseq-preprocess commands for text in subwords."""

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
    """pieces/SPLIT -> folder, for monolingual text."""
    return [script("fairseq-preprocess"), "--only-source", *_rest(pieces, folder, workers), *flags]


def longest_sentence(folder: Path) -> int:
    """Token count of the longest training or validation sentence in a binarised folder; 1 if there is none."""
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    files = [path for split in ("train", "valid") for path in folder.glob(f"{split}.*idx")]
    indices = [MMapIndexedDataset.Index(str(path)) for path in files]  # keep them: .sizes is invalid once its index is freed
    return max((int(index.sizes.max()) for index in indices), default=1)


def _rest(pieces: Path, folder: Path, workers: int) -> List[str]:
    splits = [word for split in SPLITS for word in (f"--{split}pref", str(pieces / split))]
    return [*splits, "--destdir", str(folder), "--workers", str(workers)]
