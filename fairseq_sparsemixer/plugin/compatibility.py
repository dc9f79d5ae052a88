"""What fairseq still expects of numpy and torch, and later versions of them dropped."""

from types import SimpleNamespace

import numpy
from fairseq.nan_detector import NanDetector


def restore_numpy_long() -> None:
    """Give numpy its `compat.long` back (gone from numpy 2), by which fairseq splits text at line ends."""
    if not hasattr(numpy, "compat"):
        numpy.compat = SimpleNamespace(long=int)  # type: ignore[attr-defined]  # that is the point


def look_for_nans_forward_only() -> None:
    """Let fairseq's search for the first NaN set no backward hooks: torch takes them for modules that return tensors alone.

    fairseq's encoders return dictionaries of lists, our gates a Routing: the search ended in a TypeError or StopIteration of
    torch's, which hid the NaN. What the gradients of the parameters are, it prints at the end in any case.
    """
    NanDetector.__init__.__defaults__ = (True, False)  # forward, backward
