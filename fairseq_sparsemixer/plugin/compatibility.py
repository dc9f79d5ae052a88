"""Shims for numpy and torch APIs that fairseq still uses and newer versions removed."""

from types import SimpleNamespace

import numpy
from fairseq.nan_detector import NanDetector


def restore_numpy_long() -> None:
    """Restore numpy's `compat.long` (removed in numpy 2), which fairseq uses to split text into lines."""
    if not hasattr(numpy, "compat"):
        numpy.compat = SimpleNamespace(long=int)  # type: ignore[attr-defined]  # that is the point


def look_for_nans_forward_only() -> None:
    """Keep fairseq's NaN detector from setting backward hooks, which torch supports only on modules that return tensors.

    fairseq's encoders return dictionaries of lists and our gates a Routing, so the detector ended in a TypeError or
    StopIteration from torch, which hid the NaN. It still prints the parameters' gradients at the end.
    """
    NanDetector.__init__.__defaults__ = (True, False)  # forward, backward
