"""A folder to write, on the commands' lines."""

import argparse
from pathlib import Path


def folder(text: str) -> Path:
    """argparse's type: an empty word, as of a shell's variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)
