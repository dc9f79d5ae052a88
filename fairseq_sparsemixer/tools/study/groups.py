"""Groups of runs that differ in the seed only, and how they are paired with the runs of another model.

A run is a dict as results.py gathers it: run, group, router, num_experts, seed, valid_loss, curve, test, ...
"""

import math
import statistics
from typing import Any, Dict, List, Optional, Sequence, Tuple

Members = List[Dict[str, Any]]  # the runs of one group, one per seed


def by_group(runs: Sequence[Dict[str, Any]]) -> Dict[str, Members]:
    """The runs of each group, such as `switch-e4`, in the order of their first runs."""
    groups: Dict[str, Members] = {}
    for run in runs:
        groups.setdefault(run["group"], []).append(run)
    return groups


def paired(members: Members, others: Members) -> List[Tuple[Dict[str, Any], Dict[str, Any]]]:
    """The runs of two groups with the same seed, side by side, ordered by seed."""
    by_seed = {run["seed"]: run for run in others}
    return [(run, by_seed[run["seed"]]) for run in sorted(members, key=lambda run: run["seed"]) if run["seed"] in by_seed]


def baseline_of(groups: Dict[str, Members], name: str, baseline: str) -> Optional[str]:
    """The group of the baseline that a group is compared with: the one with as many experts.

    A dense model is compared with the baseline with the fewest experts. If the baseline is dense, all are compared with it.
    """
    experts = groups[name][0]["num_experts"]
    candidates = {other: members[0]["num_experts"] for other, members in groups.items() if members[0]["router"] == baseline}
    same = [other for other, theirs in candidates.items() if theirs in (experts, None)]
    fewest = sorted(candidates, key=lambda other: candidates[other] or 0) if experts is None else []
    return next(iter(same or fewest), None)


def deviation(values: Sequence[float]) -> Optional[float]:
    """The sample's standard deviation: None for fewer than two values, NaN if one of them is not finite."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan
