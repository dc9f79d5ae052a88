"""Artificial runs in the form that results.py collects, for tests of the analysis."""

from typing import Any, Callable, Dict, List, Optional

from fairseq_sparsemixer.tools.study import report
from fairseq_sparsemixer.tools.study.analysis import analysed


def runs(
    router: str,
    losses: List[float],
    experts: Optional[int] = None,
    test: Optional[Callable[[float], Dict[str, Any]]] = None,
    curves: Optional[List[List[float]]] = None,
) -> List[Dict[str, Any]]:
    """The runs of a model, one per final loss, with seeds 1, 2, ...; a validation every 10 updates and 5 seconds.

    test: final loss -> test result. curves: for each run, the losses before the final one.
    """
    group = router if experts is None else f"{router}-e{experts}"
    made = []
    for seed, loss in enumerate(losses, start=1):
        levels = [*(curves[seed - 1] if curves else [9.0]), loss]
        times = range(1, len(levels) + 1)
        curve = {"updates": [10 * time for time in times], "seconds": [5.0 * time for time in times], "losses": levels}
        run = {"run": f"{group}-seed{seed}", "group": group, "router": router, "num_experts": experts, "seed": seed}
        run.update(valid_loss=loss, best_valid_loss=loss, train_seconds=9.0, spikes=0, load_max=None, curve=curve, machine="m")
        made.append({**run, **({"test": test(loss)} if test else {})})
    return made


def text(*members: List[Dict[str, Any]], baseline: str = "switch", wide: Optional[str] = None) -> str:
    """The report on some runs."""
    results = {"title": "t", "machines": [], "baseline": baseline, "wide": wide, "runs": sum(members, [])}
    return report.markdown(analysed(results))
