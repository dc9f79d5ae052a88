"""A model against the baseline, paired by seed: the difference of the final losses, and how much faster it gets there."""

import math
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.study.curve import Curve
from fairseq_sparsemixer.tools.study.groups import Members, paired
from fairseq_sparsemixer.tools.study.intervals import mean_interval


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
        "speed_up": {unit: _mean_speed_up([race and race[unit] for race in races.values()]) for unit in ("updates", "seconds")},
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
