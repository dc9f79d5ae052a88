"""Tuning: each model gets the value of a flag, such as the learning rate, that is best in a training with one seed.

Trials are runs like others, with their own folders, from which the choice is read each time. They are not scored on the test set.
A training that ends in a FloatingPointError has diverged: its value is never chosen.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.tools.study.cells import number
from fairseq_sparsemixer.tools.study.claims import is_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import RESULT
from fairseq_sparsemixer.tools.study.curve import read_validated
from fairseq_sparsemixer.tools.study.grid import Study
from fairseq_sparsemixer.tools.tables import cell, markdown_table

DIVERGED = "diverged"  # in a trial's result: what fairseq said
NOTE = "Final validation loss of one training per value, with seed {seed}{budget}. All seeds are trained with the best value."
AT_EDGE = "**Warning:** the best {flag} is at the edge of the values tried, and a better one may lie beyond: {models}."


def tuning(study: Study, out: Path) -> List[Dict[str, Any]]:
    """What was tried for each tuned model: {"group", "tried": [{"value", "valid_loss", "diverged"}], "chosen", "edge"}.

    valid_loss: of the last validation; None if the training diverged or is not finished. chosen: None until all trials of the
    model are finished, or if all diverged. edge: "lowest" or "highest" if the chosen number is that of the values, else None.
    """
    models: Dict[str, List[Dict[str, Any]]] = {}
    for trial in study.trials():
        value = trial.flags[study.tune.flag] if study.tune else None
        models.setdefault(trial.group, []).append({"value": value, **_outcome(run_folder(out, trial))})
    return [{"group": group, "tried": tried, **_choice(tried)} for group, tried in models.items()]


def tuned(study: Study, out: Path, missing: Optional[str] = None) -> Study:
    """The study with the values chosen so far. missing: a placeholder for values that are not chosen yet."""
    chosen = {model["group"]: missing if model["chosen"] is None else model["chosen"] for model in tuning(study, out)}
    return replace(study, chosen={group: value for group, value in chosen.items() if value is not None})


def untunable(study: Study, out: Path) -> List[str]:
    """A sentence for each model whose trials all diverged."""
    return [
        f"{model['group']} is not trained: it diverged with every {study.tune.flag} that was tried; give other values"
        for model in tuning(study, out)
        if study.tune and all(trial["diverged"] for trial in model["tried"])
    ]


def tuning_section(results: Dict[str, Any]) -> List[str]:
    """The report's paragraphs on the values that were tried, and a warning where the chosen one is the last of the range."""
    tuning = results.get("tuning")
    if tuning is None:
        return []
    flag, models = tuning["flag"], tuning["models"]
    header = ["model", *(str(trial["value"]) for trial in models[0]["tried"]), "chosen"]
    cells = [[model["group"], *map(_loss, model["tried"]), cell("{}", model["chosen"])] for model in models]
    note = NOTE.format(seed=tuning["seed"], budget="".join(f", --{name} {value}" for name, value in tuning["flags"].items()))
    parts = [f"### Tuning of {flag}", markdown_table(header, cells), note]
    edges = ", ".join(f"{model['group']} ({model['chosen']}, the {model['edge']})" for model in models if model["edge"])
    return parts + ([AT_EDGE.format(flag=flag, models=edges)] if edges else [])


def _loss(trial: Dict[str, Any]) -> str:
    return "diverged" if trial["diverged"] else number(trial["valid_loss"], 3)


def _outcome(folder: Path) -> Dict[str, Any]:
    """The loss of a trial, or that it diverged."""
    if not is_finished(folder):
        return {"valid_loss": None, "diverged": False}
    if DIVERGED in json.loads((folder / RESULT).read_text(encoding="utf-8")):
        return {"valid_loss": None, "diverged": True}
    _, loss = read_validated(folder).valid_loss[-1]
    good = math.isfinite(loss)
    return {"valid_loss": loss if good else None, "diverged": not good}


def _choice(tried: List[Dict[str, Any]]) -> Dict[str, Any]:
    known = [trial for trial in tried if trial["valid_loss"] is not None]
    if not known or any(trial["valid_loss"] is None and not trial["diverged"] for trial in tried):
        return {"chosen": None, "edge": None}
    chosen = min(known, key=lambda trial: trial["valid_loss"])["value"]
    values = [trial["value"] for trial in tried]
    ordered = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    edges = {min(values): "lowest", max(values): "highest"} if ordered else {}
    return {"chosen": chosen, "edge": edges.get(chosen)}
