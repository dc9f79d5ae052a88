"""A language model's data from the quickstart's: python -m recipes.multilingual.language_model DATA OUT.

DATA is the data folder of `make quickstart` (runs/quickstart/data). A line of OUT/pieces is a target sentence in pieces behind
its language tag; OUT/bin is the same, binarised.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Iterator, List, Optional

from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.binarisation import text_command
from recipes.common.corpus import SPLITS
from recipes.common.progress import run_program
from recipes.common.session import file_errors_said, keep_apart, run_as_program
from recipes.common.steps import run_step
from recipes.common.text import write_splits


def main(arguments: Optional[List[str]] = None) -> None:
    """Write and binarise the target sentences with their tags."""
    parser = argparse.ArgumentParser(prog="python -m recipes.multilingual.language_model", description=__doc__.split("\n", 1)[0])
    parser.add_argument("data", type=Path, help="data folder of make quickstart, such as runs/quickstart/data")
    parser.add_argument("out", type=Path, help="folder to write to, such as runs/language_model")
    options = parser.parse_args(arguments)
    keep_apart(options.data, options.out)
    pieces = options.data / "pieces"
    with file_errors_said(options.out):
        run_step("language model data", options.out, {"pieces": str(pieces.resolve())}, Console(), partial(make_data, pieces))


def make_data(pieces: Path, folder: Path, console: Console) -> None:
    """Make folder/pieces and folder/bin."""
    write_splits({split: tagged(pieces, split) for split in SPLITS}, folder / "pieces", console)
    run_program(text_command(folder / "pieces", folder / "bin", 1), folder / "console.log", console)


def tagged(pieces: Path, split: str) -> Iterator[str]:
    """The target sentences of a split, each behind its source's language tag. Raises ConfigurationError without tags."""
    with (pieces / f"{split}.en").open(encoding="utf-8") as sources, (pieces / f"{split}.xx").open(encoding="utf-8") as targets:
        for source, target in zip(sources, targets):
            tag = source.split()[1]  # behind the mark of a word's start
            if not tag.startswith("<2"):
                raise ConfigurationError(f"{sources.name} has a sentence without a language tag; make it with make quickstart")
            yield f"{tag} {target.strip()}"


if __name__ == "__main__":
    run_as_program(main)
