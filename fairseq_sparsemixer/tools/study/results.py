"""A study's results: the figures of every finished run, read from its folder, with their analysis."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.tools.study.analysis import analysed
from fairseq_sparsemixer.tools.study.claims import check_all, is_complete, run_folder
from fairseq_sparsemixer.tools.study.commands import RESULT
from fairseq_sparsemixer.tools.study.curve import Curve, count_spikes, read_validated
from fairseq_sparsemixer.tools.study.grid import Run, Study
from fairseq_sparsemixer.tools.study.translation import translations
from fairseq_sparsemixer.tools.study.tuning import tuned, tuning


def gather(study: Study, out: Path) -> Dict[str, Any]:
    """The results of all finished runs, ready for JSON: their analysis (see analysis.py), tuning, and translations.

    `unfinished`: the names of the other runs. Raises ConfigurationError for runs of other flags or data than the study has now.
    """
    study = tuned(study, out)
    planned = replace(study, tune=None).runs()  # with those that wait for the choice of a value
    finished = [run for run in study.runs() if is_complete(study, run, run_folder(out, run))]
    check_all(study, [*(trial for trial in study.trials() if is_complete(study, trial, run_folder(out, trial))), *finished], out)
    runs = [_run_figures(study, run, run_folder(out, run)) for run in finished]
    machines = sorted({run["machine"] for run in runs})
    about = {"title": study.title, "machines": machines, "baseline": study.baseline, "wide": study.wide}
    unfinished = sorted({run.name for run in planned} - {run.name for run in finished})
    results = analysed({**about, "unfinished": unfinished, "runs": runs})
    if study.tune is not None:
        tune = {"flag": study.tune.flag, "seed": study.tune.seed, "flags": study.tune.flags}
        results["tuning"] = {**tune, "models": tuning(study, out)}
    if study.test is not None and study.test.metric == "bleu":
        results["translations"] = translations(study.test, out, runs, study.baseline)
        for group in results["groups"]:  # where earlier versions have it
            group["bleu_p_value"] = results["translations"]["models"].get(group["group"], {}).get("BLEU", {}).get("p")
    return results


def _run_figures(study: Study, run: Run, folder: Path) -> Dict[str, Any]:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    log = read_validated(folder)
    curve = Curve.of(log)
    if study.test is None:  # another study in this folder has scored it
        result.pop("test", None)
    return {
        **result,
        "group": run.group,
        "updates": curve.updates[-1],
        "valid_loss": curve.losses[-1],
        "best_valid_loss": min(filter(math.isfinite, curve.losses), default=math.nan),
        "train_seconds": curve.seconds[-1],
        "spikes": count_spikes(log.train_loss),
        "load_max": None if log.load is None else _busiest(log.load.counts[-1][1]),
        "curve": curve._asdict(),
    }


def _busiest(counts: List[List[int]]) -> float:
    """Tokens of the busiest expert of any layer over its layer's mean, from counts [L][E]."""
    return max(max(layer) * len(layer) / max(sum(layer), 1) for layer in counts)
