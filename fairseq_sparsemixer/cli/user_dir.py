"""Print the folder to pass to fairseq's --user-dir.

example:
  fairseq-train DATA --user-dir "$(fairseq-sparsemixer user-dir)" --arch transformer_moe ...
"""

import argparse
from pathlib import Path

import fairseq_sparsemixer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(options: argparse.Namespace) -> None:
    """Print the package's folder."""
    print(Path(fairseq_sparsemixer.__file__).parent)
