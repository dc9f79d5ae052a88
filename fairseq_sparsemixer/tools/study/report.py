"""A study's results as a table in Markdown."""

from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.study.headroom import DISTINCT
from fairseq_sparsemixer.tools.tables import NOTHING, cell, markdown_table

COLUMNS = (
    "router",
    "experts",
    "seeds",
    "valid loss",
    "test",
    "p",
    "seconds",
    "spikes",
    "load max/mean",
)
NOTE = """Mean ± standard deviation over seeds.
`p`: paired bootstrap of BLEU against the baseline, {baseline}, with as many experts.
`seconds`: updates times the median time of one, without validation. `spikes`: training losses 1.2 times the one logged before.
`load max/mean`: tokens of the busiest expert of any layer over the mean, late in training."""

COMPARISON = "### Against {baseline}"
COMPARISON_COLUMNS = ("model", "baseline", "seeds", "valid loss difference", "speed-up in updates", "speed-up in time")
COMPARISON_NOTE = """Paired by seed: mean over the common seeds [95% interval, Student's t].
`valid loss difference`: final validation loss minus the baseline's (below 0: better). `speed-up`: updates, or time, in which the
baseline first reaches its own final loss, over those in which the model reaches that loss (above 1: faster). One such interval in
twenty misses the true mean by chance."""
NO_INTERVAL = "One seed gives no interval."
HEADROOM = "### Headroom"
HEADROOM_COLUMNS = ("model", "figure", "seeds", "better than dense by", "seeds' deviation", "gap / deviation")
HEADROOM_NOTE = """How much better than {dense} each model is, in the figure's own unit; mean over the common seeds.
`seeds' deviation`: standard deviation over seeds, pooled over the two models."""
ONE_SEED = "One seed gives no standard deviation."
TOO_SMALL = (
    f"**Warning:** this task cannot tell routers apart where the gap to {{dense}} is below {DISTINCT} standard deviations of the"
    " seeds, or negative: {models}."
)
NO_HEADROOM = "Unknown: it takes a finished run of a dense variant and, with the same seed, one of {baseline} with experts."


def rows(results: Dict[str, Any]) -> List[List[str]]:
    """The cells of the table, a row a group, in COLUMNS' order."""
    return [
        [
            group["router"],
            cell("{}", group["num_experts"]),
            str(group["seeds"]),
            _spread(group["valid_loss"], 3),
            _spread(group["test"], 2),
            _number(group.get("bleu_p_value"), 3),
            _spread(group["train_seconds"], 0),
            _spread(group["spikes"], 1),
            _spread(group["load_max"], 2),
        ]
        for group in results["groups"]
    ]


def markdown(results: Dict[str, Any]) -> str:
    """The tables of a study, as `analysed` returns it, with what the columns mean."""
    parts = [f"## {results['title']}", markdown_table(COLUMNS, rows(results)), NOTE.format(baseline=results["baseline"])]
    parts += _comparisons(results) + _headroom(results)
    return "\n\n".join([*parts, "\n".join(results["machines"])]) + "\n"


def _comparisons(results: Dict[str, Any]) -> List[str]:
    """Every model's difference to the baseline."""
    compared = [(group["group"], group["comparison"]) for group in results["groups"] if group["comparison"]]
    if not compared:
        return []
    cells = [
        [
            name,
            comparison["baseline"],
            str(len(comparison["seeds"])),
            _interval(comparison["difference"], 3),
            *(_speed_up(comparison, unit) for unit in ("updates", "seconds")),
        ]
        for name, comparison in compared
    ]
    parts = [COMPARISON.format(baseline=results["baseline"]), markdown_table(COMPARISON_COLUMNS, cells), COMPARISON_NOTE]
    return parts + ([NO_INTERVAL] if any(len(comparison["seeds"]) == 1 for _, comparison in compared) else [])


def _speed_up(comparison: Dict[str, Any], unit: str) -> str:
    missed, seeds = len(comparison["not_reached"]), len(comparison["seeds"])
    if missed:
        return "not reached" if missed == seeds else f"not reached by {missed} of {seeds} seeds"
    return _interval(comparison["speed_up"][unit], 2)


def _headroom(results: Dict[str, Any]) -> List[str]:
    """The gaps to the dense model, what they are, and a warning where they are too small."""
    gaps = results["headroom"]
    if not gaps:
        return [HEADROOM, NO_HEADROOM.format(baseline=results["baseline"])]
    cells = [
        [
            gap["model"],
            gap["figure"],
            str(len(gap["seeds"])),
            _number(gap["gap"], 3),
            _number(gap["deviation"], 3),
            _number(gap["gap"] / gap["deviation"] if gap["gap"] is not None and gap["deviation"] else None, 1),
        ]
        for gap in gaps
    ]
    parts = [HEADROOM, markdown_table(HEADROOM_COLUMNS, cells), HEADROOM_NOTE.format(dense=gaps[0]["dense"])]
    parts += [ONE_SEED] if any(len(gap["seeds"]) == 1 for gap in gaps) else []
    small: Dict[str, List[str]] = {}
    for gap in gaps:
        if not gap["distinct"]:
            small.setdefault(gap["model"], []).append(gap["figure"])
    models = ", ".join(f"{model} ({', '.join(figures)})" for model, figures in small.items())
    return parts + ([TOO_SMALL.format(dense=gaps[0]["dense"], models=models)] if small else [])


def _number(value: Optional[float], digits: int) -> str:
    return cell(f"{{:.{digits}f}}", value)


def _spread(figure: Optional[Dict[str, Optional[float]]], digits: int) -> str:
    if figure is None:
        return NOTHING
    deviation = figure["deviation"]
    return _number(figure["mean"], digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _interval(figure: Optional[Dict[str, Optional[float]]], digits: int) -> str:
    if figure is None:
        return NOTHING
    low, high = figure["low"], figure["high"]
    return _number(figure["mean"], digits) + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")
