"""The argument type of an output folder."""

import argparse
from pathlib import Path


def folder(text: str) -> Path:
    """An argparse type that rejects an empty word, as from an unset shell variable, which would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)
