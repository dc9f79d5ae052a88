"""The analysis of a study's runs: figures of each model over its seeds, comparison with the baseline, headroom."""

import statistics
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.study.comparisons import compare
from fairseq_sparsemixer.tools.study.groups import Members, baseline_of, by_group, deviation
from fairseq_sparsemixer.tools.study.headroom import headroom

FIGURES = ("valid_loss", "best_valid_loss", "train_seconds", "spikes", "load_max")


def analysed(results: Dict[str, Any]) -> Dict[str, Any]:
    """The results with everything that follows from `runs`, `baseline` and `wide`; also for results of earlier versions.

    `groups`: each router with its number of experts. Its figures are means and standard deviations over seeds (None for fewer
    than two). `comparison`: see comparisons.py (None for the baseline). `headroom`: see headroom.py.
    """
    groups = by_group(results["runs"])
    old = {
        group["group"]: group for group in results.get("groups", [])
    }  # may have figures that were read from the folders of the runs
    analysis = []
    for name, members in groups.items():
        baseline = baseline_of(groups, name, results["baseline"])
        comparison = None if baseline in (None, name) else compare(members, groups[baseline])
        analysis.append({**old.get(name, {}), **_figures(name, members), "comparison": comparison})
    return {**results, "groups": analysis, "headroom": headroom(results["runs"], results["baseline"], results.get("wide"))}


def _figures(name: str, members: Members) -> Dict[str, Any]:
    group = {"group": name, "router": members[0]["router"], "num_experts": members[0]["num_experts"], "seeds": len(members)}
    figures = {figure: _mean_and_deviation([member[figure] for member in members]) for figure in FIGURES}
    scores = [member["test"]["score"] for member in members if member.get("test")]
    return {**group, **figures, "test": _mean_and_deviation(scores)}


def _mean_and_deviation(values: List[Optional[float]]) -> Optional[Dict[str, Optional[float]]]:
    known = [value for value in values if value is not None]
    return {"mean": statistics.fmean(known), "deviation": deviation(known)} if known else None
