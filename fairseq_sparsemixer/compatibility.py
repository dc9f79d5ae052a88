"""What fairseq still expects of numpy and later versions of it dropped."""

from types import SimpleNamespace

import numpy


def restore_numpy_long() -> None:
    """Give numpy its `compat.long` back (gone from numpy 2), by which fairseq splits text at line ends."""
    if not hasattr(numpy, "compat"):
        numpy.compat = SimpleNamespace(long=int)
