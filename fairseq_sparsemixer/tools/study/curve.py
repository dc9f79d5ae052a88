"""Validation losses over a training, and where they reach a level."""

import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.runs import Run, read_run

SPIKE = 1.2  # a logged training loss this many times the one before counts as a spike


class Point(NamedTuple):
    """A point of a curve: updates done, seconds of training, validation loss."""

    updates: float
    seconds: float
    loss: float


class Curve(NamedTuple):
    """Validation losses, the updates before each, and the seconds: updates times the run's median time per update."""

    updates: List[int]
    seconds: List[float]
    losses: List[float]

    @staticmethod
    def of(run: Run) -> "Curve":
        """The curve of one training. If the log has no training interval (shorter than --log-interval), all seconds are 0."""
        updates = [done for done, _ in run.valid_loss]
        seconds = [done * (run.seconds_per_update or 0.0) for done in updates]
        return Curve(updates, seconds, [loss for _, loss in run.valid_loss])

    @staticmethod
    def mean(curves: Sequence[Dict[str, Any]]) -> "Curve":
        """The mean of curves given as dicts, at the validations that all of them have."""
        common = sorted(set.intersection(*(set(curve["updates"]) for curve in curves)))
        by_update = [{u: row for u, *row in zip(c["updates"], c["seconds"], c["losses"])} for c in curves]
        means = [[sum(values) / len(curves) for values in zip(*(rows[u] for rows in by_update))] for u in common]
        return Curve(common, [seconds for seconds, _ in means], [loss for _, loss in means])

    def first_below(self, loss: float) -> Optional[Point]:
        """Where the curve first reaches `loss`, interpolated between validations; None if it never does."""
        points = [Point(*point) for point in zip(*self)]
        for before, after in zip([None, *points], points):
            if after.loss <= loss:
                if before is None or not math.isfinite(before.loss):  # NaN once, and recovered
                    return after
                share = (before.loss - loss) / (before.loss - after.loss)
                return Point(*(start + share * (stop - start) for start, stop in zip(before, after)))
        return None


def read_validated(folder: Path) -> Run:
    """The log of a run. Raises ConfigurationError for one without a validation."""
    run = read_run(folder)
    if not run.valid_loss:
        raise ConfigurationError(f"{folder} has no validation in its log; let fairseq-train validate, or delete the folder")
    return run


def count_spikes(train_losses: Sequence[float]) -> int:
    """How many times the logged training loss jumped."""
    return sum(after > SPIKE * before for before, after in zip(train_losses, train_losses[1:]))
