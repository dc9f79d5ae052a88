"""A study's results as a table in Markdown."""

from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.tables import NOTHING, cell, markdown_table

COLUMNS = (
    "router",
    "experts",
    "seeds",
    "valid loss",
    "test",
    "p",
    "updates to baseline",
    "time to baseline",
    "seconds",
    "spikes",
    "load max/mean",
)
NOTE = """Mean ± standard deviation over seeds.
`p`: paired bootstrap of BLEU against the baseline, {baseline}, with as many experts.
`updates to baseline`, `time to baseline`: where the mean validation curve first reaches the baseline's final loss, as a share of
the baseline's own updates and training time (below 1: faster; –: not within this budget). `seconds`: updates times the median
time of one, without validation. `spikes`: training losses 1.2 times the one logged before. `load max/mean`: tokens of the busiest
expert of any layer over the mean, late in training."""


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
            _number((group.get("to_baseline") or {}).get("updates"), 2),
            _number((group.get("to_baseline") or {}).get("seconds"), 2),
            _spread(group["train_seconds"], 0),
            _spread(group["spikes"], 1),
            _spread(group["load_max"], 2),
        ]
        for group in results["groups"]
    ]


def markdown(results: Dict[str, Any]) -> str:
    """The table with its title and what the columns mean."""
    lines = [f"## {results['title']}", "", markdown_table(COLUMNS, rows(results)), ""]
    return "\n".join([*lines, NOTE.format(baseline=results["baseline"]), "", *results["machines"], ""])


def _number(value: Optional[float], digits: int) -> str:
    return cell(f"{{:.{digits}f}}", value)


def _spread(figure: Optional[Dict[str, Optional[float]]], digits: int) -> str:
    if figure is None:
        return NOTHING
    deviation = figure["deviation"]
    return _number(figure["mean"], digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")
