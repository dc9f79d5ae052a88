"""A study's results: the figures of every finished run, read from its folder, and what they say together."""

import json
import math
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fairseq_sparsemixer.tools.study.analysis import analysed
from fairseq_sparsemixer.tools.study.claims import is_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import RESULT
from fairseq_sparsemixer.tools.study.curve import Curve, count_spikes, read_validated
from fairseq_sparsemixer.tools.study.groups import Members, baseline_of, by_group
from fairseq_sparsemixer.tools.study.scores import read_hypotheses, read_references
from fairseq_sparsemixer.tools.study.tuning import tuned, tuning
from fairseq_sparsemixer.tools.study.grid import Run, Study

RESAMPLES = 1000  # of the paired bootstrap, sacreBLEU's own default


def gather(study: Study, out: Path) -> Dict[str, Any]:
    """The results of all finished runs, ready for JSON: their analysis (see analysis.py), tuning, and p-values of BLEU."""
    study = tuned(study, out)
    finished = [run for run in study.runs() if is_finished(run_folder(out, run))]
    runs = [_run_figures(study, run, run_folder(out, run)) for run in finished]
    machines = sorted({run["machine"] for run in runs})
    results = analysed({"title": study.title, "machines": machines, "baseline": study.baseline, "wide": study.wide, "runs": runs})
    if study.tune is not None:
        about = {"flag": study.tune.flag, "seed": study.tune.seed, "flags": study.tune.flags}
        results["tuning"] = {**about, "models": tuning(study, out)}
    if study.test is not None and study.test.metric == "bleu":
        members = by_group(runs)
        for group in results["groups"]:
            baseline = baseline_of(members, group["group"], study.baseline)
            if baseline not in (None, group["group"]):
                group["bleu_p_value"] = _bootstrap(study, out, members[group["group"]], members[baseline])
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


def _bootstrap(study: Study, out: Path, members: Members, baseline: Members) -> Optional[float]:
    """sacreBLEU's paired bootstrap on the test sets of all common seeds laid end to end: the p-value of the difference."""
    seeds = sorted({member["seed"] for member in members} & {member["seed"] for member in baseline})
    if not seeds:
        return None
    assert study.test is not None
    references = read_references(study.test) * len(seeds)
    systems: List[Tuple[str, Sequence[str]]] = []
    for name, side in (("baseline", baseline), ("router", members)):
        folders = {member["seed"]: out / "runs" / member["run"] for member in side}
        systems.append((name, [line for seed in seeds for line in read_hypotheses(folders[seed] / "test.txt")]))
    result: Any = PairedTest(systems, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=RESAMPLES)()
    return result[1]["BLEU"][1].p_value
