"""Monolingual text: WikiText's archives, checked and written line by line."""

from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Mapping

from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import SPLITS, read_member

Splits = Mapping[str, Iterable[str]]  # lines by split


def read_wikitext(folder: Path, archive: str, members: Dict[str, str]) -> Splits:
    """The splits of a WikiText archive in folder, or of its unpacked files."""
    return {split: read_member(folder, archive, member).lines for split, member in members.items()}


def write_splits(splits: Splits, folder: Path, console: Console) -> None:
    """Write folder/SPLIT for each split. Raises ConfigurationError for a split without words."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        words = 0
        with (folder / split).open("w", encoding="utf-8", newline="\n") as file:
            for line in splits[split]:
                words += len(line.split())
                file.write(line + "\n")
        if not words:
            raise ConfigurationError(f"the {split} split has no words; provide one with text")
        console.print(f"{split}: {words:,} words", highlight=False)


def last_figures(log: Path, read: Callable[[str], Any]) -> Any:
    """`read` applied to the last line of a log for which it returns figures. Raises ConfigurationError if there is none."""
    found = [figures for figures in map(read, log.read_text(encoding="utf-8").splitlines()) if figures]
    if not found:
        raise ConfigurationError(f"{log} has no figures; delete its folder and run evaluate again")
    return found[-1]
