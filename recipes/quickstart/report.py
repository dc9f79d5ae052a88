"""The end of the quickstart: tables of the runs, on screen and as Markdown and JSON, and plots."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Dict, NamedTuple, Optional, Tuple

from rich.console import Console

from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.tools.machine import describe_machine
from fairseq_sparsemixer.tools.plotting import plot_expert_load, plot_language_load, plot_valid_loss
from fairseq_sparsemixer.tools.runs import Run, read_run
from fairseq_sparsemixer.tools.study.claims import run_folder
from fairseq_sparsemixer.tools.study.commands import BEST, RESULT
from fairseq_sparsemixer.tools.study.grid import Study
from fairseq_sparsemixer.tools.study.results import gather
from fairseq_sparsemixer.tools.study.translation import translation_section
from fairseq_sparsemixer.tools.tables import cell, markdown_table

if TYPE_CHECKING:
    from fairseq_sparsemixer.tools.language_table import LanguageLoad

COLUMNS = {
    "router": "{}",
    "parameters": "{:,}",
    "active": "{:,}",
    "updates": "{:,}",
    "valid loss": "{:.3f}",
    "sacreBLEU": "{:.1f}",
    "expert load entropy": "{:.3f}",
    "language bits": "{:.2f}",
}
FIGURES = (
    "router",
    "parameters",
    "active_parameters",
    "updates",
    "valid_loss",
    "bleu",
    "load_entropy",
    "language_bits",
)  # of the columns
# no speeds: runs that come one after the other, or are interrupted, have met a machine with more or less other work
LEGEND = (
    "active: parameters that one token uses. valid loss: label-smoothed cross-entropy, bits per token, best validation."
    " expert load entropy: entropy of per-expert token shares / log E (1 = balanced). language bits: mutual information of target"
    " language and expert, mean over layers (0: all languages use the experts alike)."
)


def report(study: Study, out: Path, console: Console) -> None:
    """Show the tables of a finished study; write results.md, results.json and the plots to out/results."""
    folders = {run.router: run_folder(out, run) for run in study.runs()}
    runs = [replace(read_run(folder), name=router) for router, folder in folders.items()]
    models = {run.name: read_model(study, run.name, folder / BEST) for run, folder in zip(runs, folders.values())}
    loads = {router: model.load for router, model in models.items() if model.load is not None}
    results = [figures(run, folder, models[run.name]) for run, folder in zip(runs, folders.values())]
    rows = [[cell(form, result[name]) for name, form in zip(FIGURES, COLUMNS.values())] for result in results]
    notes = [LEGEND, *translation_section(gather(study, out)), f"{study.title}; {describe_machine()}"]
    text = "\n\n".join([markdown_table(list(COLUMNS), rows), *notes])
    console.print(text, markup=False, highlight=False)

    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "results.md", text + "\n")
    content = {"data": study.title, "machine": describe_machine(), "results": results}
    write_whole(folder / "results.json", json.dumps(content, indent=2) + "\n")
    plot_valid_loss(runs, folder / "valid_loss.png")
    plot_expert_load(runs, folder / "expert_load.png")
    if loads:
        plot_language_load(loads, folder / "language_load.png")
    console.print(f"[green]✓[/] {', '.join(sorted(path.name for path in folder.iterdir()))} are in {folder}")


class Model(NamedTuple):
    """parameters: in total, and those that a token uses. load: which experts each target language uses on the test set.

    load is None for a dense model, and if there is one target language.
    """

    parameters: Tuple[int, int]
    load: Optional["LanguageLoad"]


def read_model(study: Study, router: str, checkpoint: Path) -> Model:
    """What the report says of a trained model, which is loaded once."""
    from fairseq_sparsemixer.plugin.models import parameter_counts
    from fairseq_sparsemixer.tools.language_load import load_of_model
    from fairseq_sparsemixer.tools.sentences import load_model  # loads fairseq, which takes seconds

    model, _, task = load_model(str(checkpoint), None)
    one_language = study.test is None or study.test.languages is None
    routed = study.routers[router]["router"] != DENSE and not one_language
    return Model(parameter_counts(model), load_of_model(model, task, str(checkpoint)) if routed else None)


def figures(run: Run, folder: Path, model: Model) -> Dict[str, Any]:
    """What fairseq logged of a run, its parameters, its score, and how much its experts specialise by language."""
    test = json.loads((folder / RESULT).read_text(encoding="utf-8"))["test"]
    total, active = model.parameters
    sizes = {"parameters": total, "active_parameters": active}
    bits = None if model.load is None else fmean(model.load.information())
    return {
        "router": run.name,
        **run.figures(),
        **sizes,
        "bleu": test["score"],
        "signature": test["signature"],
        "language_bits": bits,
    }
