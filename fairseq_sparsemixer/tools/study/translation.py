"""BLEU and chrF of a study's translations: 95% intervals of their difference to the baseline, and scores by language.

One interval is of a paired bootstrap over the sentences of the test set: a resample draws sentences with replacement, the same
ones for all models, and with each the translations of all seeds. It covers the choice of sentences, not the noise of training,
which the other covers: Student's t over the differences of the seeds.
"""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from fairseq_sparsemixer.tools.study.cells import bounds, interval, number, spread
from fairseq_sparsemixer.tools.study.grid import Test
from fairseq_sparsemixer.tools.study.groups import Members, baseline_of, by_group, deviation, paired
from fairseq_sparsemixer.tools.study.intervals import mean_interval
from fairseq_sparsemixer.tools.study.scores import read_languages, read_references, read_translations
from fairseq_sparsemixer.tools.tables import markdown_table

METRICS = {"BLEU": BLEU, "chrF": CHRF}
RESAMPLES, SEED = 1000, 12345  # sacreBLEU's own defaults
TAIL = 2.5  # percent on either side of the interval
NOTE = """Mean ± standard deviation over seeds. `difference`: to the baseline with as many experts, mean over the common seeds
[95% interval, paired bootstrap over the test's sentences]: whether these runs translate differently. `over seeds`: its 95%
interval over the seeds, Student's t: whether the models do, trained again. A model is better if neither has zero in it."""
LANGUAGE_NOTE = """Difference in {name} to the baseline with as many experts, mean over the common seeds [95% interval, paired
bootstrap over the language's sentences]. One interval in twenty misses the true difference by chance."""

Scores = Dict[str, Dict[str, np.ndarray]]  # [1 + RESAMPLES] of each metric and run: of the test set, then of each resample
Pairs = List[Tuple[Dict[str, Any], Dict[str, Any]]]  # runs of a group and of its baseline with the same seed; none without one


def translations(test: Test, out: Path, runs: Members, baseline: str) -> Dict[str, Any]:
    """{"signatures": {metric: text}, "models": {group: {metric: figures}}, "languages": see _by_language} of the finished runs.

    The figures: mean and deviation over seeds, and, if there is a baseline with a common seed, the difference with its interval,
    `over_seeds` with that of the seeds, and sacreBLEU's p-value. Runs whose translations are no longer there are left out.
    """
    references = read_references(test)
    files = {run["run"]: out / "runs" / run["run"] / "test.txt" for run in runs}
    runs = [run for run in runs if files[run["run"]].is_file()]
    metrics = {name: kind(references=[references]) for name, kind in METRICS.items()}
    statistics = {run["run"]: _statistics(metrics, read_translations(test, files[run["run"]])) for run in runs}
    scores = {name: {run: _resampled(metric, own[name]) for run, own in statistics.items()} for name, metric in metrics.items()}
    groups = by_group(runs)
    pairs = {group: _pairs(groups, group, baseline) for group in groups}
    return {
        "signatures": {name: str(metric.get_signature()) for name, metric in metrics.items()},
        "models": {group: _figures(scores, members, pairs[group]) for group, members in groups.items()},
        "languages": _by_language(metrics, statistics, groups, pairs, read_languages(test)),
    }


def _statistics(metrics: Dict[str, Any], hypotheses: List[str]) -> Dict[str, np.ndarray]:
    """[sentences, figures] for each metric: what is added up over sentences before a score is computed."""
    # private names, but sacreBLEU's own significance tests use them on every metric, since 2.0
    return {name: np.array(metric._extract_corpus_statistics(hypotheses, None), float) for name, metric in metrics.items()}


def _score(metric: Any, sums: np.ndarray) -> float:
    return metric._compute_score_from_stats(sums.tolist()).score


def _resampled(metric: Any, statistics: np.ndarray) -> np.ndarray:
    """The score of the test set, and of RESAMPLES resamples: [1 + RESAMPLES]. Every call draws the same sentences."""
    count, rng = len(statistics), np.random.default_rng(SEED)
    draws = (np.bincount(rng.integers(count, size=count), minlength=count).astype(float) for _ in range(RESAMPLES))
    return np.array([_score(metric, weights @ statistics) for weights in (np.ones(count), *draws)])


def _pairs(groups: Dict[str, Members], group: str, baseline: str) -> Pairs:
    other = baseline_of(groups, group, baseline)
    return [] if other in (None, group) else paired(groups[group], groups[other])


def _differences(scores: Dict[str, np.ndarray], pairs: Pairs) -> np.ndarray:
    """[pairs, 1 + RESAMPLES]: of one metric, given {run: [1 + RESAMPLES]}."""
    return np.array([scores[own["run"]] - scores[theirs["run"]] for own, theirs in pairs])


def _figures(scores: Scores, members: Members, pairs: Pairs) -> Dict[str, Any]:
    figures: Dict[str, Any] = {}
    for name in METRICS:
        values = [float(scores[name][run["run"]][0]) for run in members]
        figures[name] = {"mean": sum(values) / len(values), "deviation": deviation(values)}
        if pairs:
            by_seed = _differences(scores[name], pairs)
            differences = by_seed.mean(axis=0)
            over_seeds = mean_interval(by_seed[:, 0].tolist())
            figures[name].update(difference=_interval(differences), over_seeds=over_seeds, p=_p_value(differences))
    return figures


def _interval(differences: np.ndarray) -> Dict[str, Optional[float]]:
    low, high = np.percentile(differences[1:], [TAIL, 100 - TAIL])
    return {"mean": float(differences[0]), "low": float(low), "high": float(high)}


def _p_value(differences: np.ndarray) -> float:
    """As sacreBLEU computes it, for comparison with papers: one-sided if the difference is clear. Equal scores have 1.

    sacreBLEU gives 1 / 1001 if all resamples are equal, too, as with models that translate nothing.
    """
    if not differences[0]:
        return 1.0
    sizes = np.abs(differences[1:])
    return float((np.sum(sizes - sizes.mean() > abs(differences[0])) + 1) / (RESAMPLES + 1))


def _by_language(
    metrics: Dict[str, Any],
    statistics: Dict[str, Dict[str, np.ndarray]],
    groups: Dict[str, Members],
    pairs: Dict[str, Pairs],
    languages: List[str],
) -> Dict[str, Dict[str, Any]]:
    """{language: {"sentences": count, metric: {group: mean score over seeds}, "difference": {metric: {group: interval}}}}.

    The intervals are those of `translations`, over the sentences of one language; groups without a baseline have none. Empty if
    the languages are not known.
    """
    result: Dict[str, Dict[str, Any]] = {}
    for language in dict.fromkeys(languages):
        chosen = np.array([other == language for other in languages])
        result[language] = {"sentences": int(chosen.sum()), "difference": {}}
        for name, metric in metrics.items():
            scores = {run: _resampled(metric, own[name][chosen]) for run, own in statistics.items()}
            means = {group: np.mean([scores[run["run"]][0] for run in members]) for group, members in groups.items()}
            result[language][name] = {group: float(mean) for group, mean in means.items()}
            result[language]["difference"][name] = {
                group: _interval(_differences(scores, both).mean(axis=0)) for group, both in pairs.items() if both
            }
    return result


def translation_section(results: Dict[str, Any]) -> List[str]:
    """The report's paragraphs on BLEU and chrF."""
    found = results.get("translations")
    if not found:
        return []
    header = ["model", *(column for name in METRICS for column in (name, "difference", "over seeds"))]
    cells = [[group, *(cell for name in METRICS for cell in _cells(own[name]))] for group, own in found["models"].items()]
    signatures = "; ".join(f"{name} {signature}" for name, signature in found["signatures"].items())
    parts = ["### Translation", markdown_table(header, cells), NOTE, f"sacreBLEU: {signatures}"]
    return parts + [part for name in METRICS if found["languages"] for part in _language_table(name, found)]


def _cells(figures: Dict[str, Any]) -> Tuple[str, str, str]:
    return spread(figures, 2), interval(figures.get("difference"), 2), bounds(figures.get("over_seeds"), 2)


def _language_table(name: str, found: Dict[str, Any]) -> List[str]:
    groups = list(found["models"])
    cells = [
        [language, str(own["sentences"]), *(number(own[name][group], 1) for group in groups)]
        for language, own in found["languages"].items()
    ]
    parts = [f"### {name} by language", markdown_table(["language", "sentences", *groups], cells)]
    differences = {language: own["difference"][name] for language, own in found["languages"].items() if "difference" in own}
    compared = [group for group in groups if any(group in own for own in differences.values())]
    if not compared:  # or of an earlier version
        return parts
    cells = [[language, *(interval(own.get(group), 1) for group in compared)] for language, own in differences.items()]
    return [*parts, LANGUAGE_NOTE.format(name=name), markdown_table(["language", *compared], cells)]
