"""Headroom: how much experts improve on a dense model, in units of the seeds' noise. Without it, routers cannot be ranked."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

from fairseq_sparsemixer.tools.study.cells import number
from fairseq_sparsemixer.tools.study.groups import Members, by_group, deviation, paired
from fairseq_sparsemixer.tools.tables import markdown_table

DISTINCT = 2  # standard deviations; a smaller gap cannot be told from the noise of the seeds
TITLE = "### Headroom"
COLUMNS = ("model", "figure", "seeds", "better than dense by", "seeds' deviation", "gap / deviation")
NOTE = """How much better than {dense} each model is, in the figure's own unit; mean over the common seeds.
`seeds' deviation`: standard deviation over seeds, pooled over the two models."""
ONE_SEED = "One seed gives no standard deviation."
TOO_SMALL = (
    f"**Warning:** this task cannot tell routers apart where the gap to {{dense}} is below {DISTINCT} standard deviations of the"
    " seeds, or negative: {models}."
)
UNKNOWN = "Unknown: it takes finished runs, with the same seed, of a dense variant and of the baseline with experts."


class Figure(NamedTuple):
    """A figure to compare models by. sign: -1 if less is better."""

    name: str
    of: Callable[[Dict[str, Any]], float]
    sign: int


VALID_LOSS = Figure("valid loss", lambda run: run["valid_loss"], -1)
BLEU = Figure("BLEU", lambda run: run["test"]["score"], 1)
PERPLEXITY = Figure("perplexity", lambda run: run["test"]["score"], -1)


def headroom(runs: Sequence[Dict[str, Any]], baseline: str, wide: Optional[str] = None) -> List[Dict[str, Any]]:
    """How much better than the dense model the baseline with experts is, per number of experts, and the wide dense model.

    The baseline with experts: the first variant with experts if the baseline is dense. A gap for each figure: {"model", "dense",
    "figure", "seeds", "gap", "deviation", "distinct"}. `gap` is the mean difference over the common seeds, positive if the model
    is better than dense. `deviation` is the seeds' standard deviation, pooled over the two models (None for one seed). `distinct`
    tells whether the gap is at least DISTINCT deviations. Empty without two models to compare.
    """
    groups = by_group(runs)
    dense = _dense(groups, baseline, wide)
    routers = [members[0]["router"] for members in groups.values() if members[0]["num_experts"] is not None]
    routed = baseline if baseline in routers else next(iter(routers), None)
    names = [name for name, members in groups.items() if members[0]["router"] in (routed, wide) and name != dense]
    return [gap for name in names if dense for gap in _gaps(name, groups[name], dense, groups[dense])]


def _dense(groups: Dict[str, Members], baseline: str, wide: Optional[str]) -> Optional[str]:
    """The dense group to compare with: the baseline if it is dense, otherwise the first except the wide one."""
    dense = [name for name, members in groups.items() if members[0]["num_experts"] is None]
    return next((name for name in dense if name == baseline), next((name for name in dense if name != wide), None))


def _gaps(name: str, members: Members, dense: str, others: Members) -> List[Dict[str, Any]]:
    pairs = paired(members, others)
    figures = [VALID_LOSS, *_test_figures(run for pair in pairs for run in pair)] if pairs else []
    return [{"model": name, "dense": dense, **_gap(figure, pairs)} for figure in figures]


def _test_figures(runs: Any) -> List[Figure]:
    """The test's figure, if all runs have one. Perplexities are stored with their logarithm, BLEU with a signature."""
    tests = [run.get("test") for run in runs]
    return [PERPLEXITY if "bits" in tests[0] else BLEU] if all(tests) else []


def _gap(figure: Figure, pairs: List[Any]) -> Dict[str, Any]:
    own, dense = ([figure.of(run) for run in side] for side in zip(*pairs))
    gap = figure.sign * (sum(own) - sum(dense)) / len(pairs)
    variances = [spread**2 for spread in map(deviation, (own, dense)) if spread is not None]
    pooled = (sum(variances) / 2) ** 0.5 if variances else None
    return {
        "figure": figure.name,
        "seeds": [run["seed"] for run, _ in pairs],
        "gap": gap,
        "deviation": pooled,
        "distinct": gap > 0 and gap >= DISTINCT * (pooled or 0),
    }


def headroom_section(results: Dict[str, Any]) -> List[str]:
    """The report's paragraphs on the gaps to the dense model, with a warning where they are too small."""
    gaps = results["headroom"]
    if not gaps:
        return [TITLE, UNKNOWN]
    cells = [
        [gap["model"], gap["figure"], str(len(gap["seeds"])), number(gap["gap"], 3), number(gap["deviation"], 3), _ratio(gap)]
        for gap in gaps
    ]
    parts = [TITLE, markdown_table(COLUMNS, cells), NOTE.format(dense=gaps[0]["dense"])]
    parts += [ONE_SEED] if any(len(gap["seeds"]) == 1 for gap in gaps) else []
    small: Dict[str, List[str]] = {}
    for gap in gaps:
        if not gap["distinct"]:
            diverged = "" if _is_finite(gap["gap"]) else ", where training diverged"
            small.setdefault(gap["model"], []).append(gap["figure"] + diverged)
    models = ", ".join(f"{model} ({', '.join(figures)})" for model, figures in small.items())
    return parts + ([TOO_SMALL.format(dense=gaps[0]["dense"], models=models)] if small else [])


def _is_finite(value: Optional[float]) -> bool:
    """False for what JSON has no number for, too."""
    return value is not None and math.isfinite(value)


def _ratio(gap: Dict[str, Any]) -> str:
    known = gap["gap"] is not None and gap["deviation"]
    return number(gap["gap"] / gap["deviation"] if known else None, 1)
