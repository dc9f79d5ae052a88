"""A study's results: the figures of every finished run, read from its folder, with their analysis."""

import json
import math
from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.tools.study.analysis import analysed
from fairseq_sparsemixer.tools.study.claims import is_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import RESULT
from fairseq_sparsemixer.tools.study.curve import Curve, count_spikes, read_validated
from fairseq_sparsemixer.tools.study.grid import Run, Study
from fairseq_sparsemixer.tools.study.translation import translations
from fairseq_sparsemixer.tools.study.tuning import tuned, tuning


def gather(study: Study, out: Path) -> Dict[str, Any]:
    """The results of all finished runs, ready for JSON: their analysis (see analysis.py), tuning, and translations."""
    study = tuned(study, out)
    finished = [run for run in study.runs() if is_finished(run_folder(out, run))]
    runs = [_run_figures(study, run, run_folder(out, run)) for run in finished]
    machines = sorted({run["machine"] for run in runs})
    results = analysed({"title": study.title, "machines": machines, "baseline": study.baseline, "wide": study.wide, "runs": runs})
    if study.tune is not None:
        about = {"flag": study.tune.flag, "seed": study.tune.seed, "flags": study.tune.flags}
        results["tuning"] = {**about, "models": tuning(study, out)}
    if study.test is not None and study.test.metric == "bleu":
        results["translations"] = translations(study.test, out, runs, study.baseline)
        for group in results["groups"]:  # where earlier versions have it
            group["bleu_p_value"] = results["translations"]["models"].get(group["group"], {}).get("BLEU", {}).get("p")
    return results


def _run_figures(study: Study, run: Run, folder: Path) -> Dict[str, Any]:
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    log = read_validated(folder)
    curve = Curve.of(log)
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
