"""Compares a model with the baseline, paired by seed: the difference of the final losses, and the speed-up."""

import math
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.study.cells import interval
from fairseq_sparsemixer.tools.study.curve import Curve
from fairseq_sparsemixer.tools.study.groups import Members, paired
from fairseq_sparsemixer.tools.study.intervals import mean_interval
from fairseq_sparsemixer.tools.tables import markdown_table

COLUMNS = ("model", "baseline", "seeds", "valid loss difference", "speed-up in updates", "speed-up in time")
NOTE = """Paired by seed: mean over the common seeds [95% interval, Student's t].
`valid loss difference`: final validation loss minus the baseline's (below 0: better). `speed-up`: updates, or time, in which the
baseline first reaches its own final loss, over those in which the model reaches that loss (above 1: faster). One such interval in
twenty misses the true mean by chance."""
ONE_SEED = "One seed gives no interval."


def compare(members: Members, baseline: Members) -> Optional[Dict[str, Any]]:
    """The comparison over the common seeds; None without any.

    `difference`: the model's final validation loss minus the baseline's. `speed_up`: the updates, and the seconds, in which the
    baseline first reaches its own final loss, over those in which the model with the same seed does. Both are means over seeds
    with 95% intervals; a speed-up is None unless all seeds get there, and `not_reached` are the seeds that do not.
    """
    pairs = paired(members, baseline)
    if not pairs:
        return None
    races = {own["seed"]: _race(Curve(**own["curve"]), Curve(**theirs["curve"])) for own, theirs in pairs}
    return {
        "baseline": baseline[0]["group"],
        "seeds": [own["seed"] for own, _ in pairs],
        "difference": mean_interval([own["valid_loss"] - theirs["valid_loss"] for own, theirs in pairs]),
        "speed_up": {
            unit: _mean_speed_up([None if race is None else race[unit] for race in races.values()])
            for unit in ("updates", "seconds")
        },
        "not_reached": [seed for seed, race in races.items() if race is None],
    }


def _race(own: Curve, baseline: Curve) -> Optional[Dict[str, Optional[float]]]:
    """How many times fewer updates and seconds the model takes to the baseline's final loss; None if it never gets there."""
    level = baseline.losses[-1]
    theirs = baseline.first_below(level) if math.isfinite(level) else None
    if theirs is None:  # the baseline has diverged
        return {"updates": None, "seconds": None}
    ours = own.first_below(level)
    if ours is None:
        return None
    return {"updates": theirs.updates / ours.updates, "seconds": theirs.seconds / ours.seconds if ours.seconds else None}


def _mean_speed_up(ratios: List[Optional[float]]) -> Optional[Dict[str, Optional[float]]]:
    known = [ratio for ratio in ratios if ratio is not None]
    return mean_interval(known) if len(known) == len(ratios) else None


def comparison_section(results: Dict[str, Any]) -> List[str]:
    """The report's paragraphs on every model's difference to the baseline."""
    compared = [(group["group"], group["comparison"]) for group in results["groups"] if group["comparison"]]
    if not compared:
        return []
    cells = [
        [
            name,
            comparison["baseline"],
            str(len(comparison["seeds"])),
            interval(comparison["difference"], 3),
            *(_speed_up(comparison, unit) for unit in ("updates", "seconds")),
        ]
        for name, comparison in compared
    ]
    parts = [f"### Against {results['baseline']}", markdown_table(COLUMNS, cells), NOTE]
    return parts + ([ONE_SEED] if any(len(comparison["seeds"]) == 1 for _, comparison in compared) else [])


def _speed_up(comparison: Dict[str, Any], unit: str) -> str:
    missed, seeds = len(comparison["not_reached"]), len(comparison["seeds"])
    if missed:
        return "not reached" if missed == seeds else f"not reached by {missed} of {seeds} seeds"
    return interval(comparison["speed_up"][unit], 2)
