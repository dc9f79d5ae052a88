"""The end of the quickstart: tables of the runs, on screen and as Markdown and JSON, and plots."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Dict, Tuple

from rich.console import Console

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
    loads = language_loads(study, folders)
    results = [figures(run, folder, loads) for run, folder in zip(runs, folders.values())]
    rows = [[cell(form, result[name]) for name, form in zip(FIGURES, COLUMNS.values())] for result in results]
    notes = [LEGEND, *translation_section(gather(study, out)), f"{study.title}; {describe_machine()}"]
    text = "\n\n".join([markdown_table(list(COLUMNS), rows), *notes])
    console.print(text, markup=False, highlight=False)

    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    content = {"data": study.title, "machine": describe_machine(), "results": results}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_valid_loss(runs, folder / "valid_loss.png")
    plot_expert_load(runs, folder / "expert_load.png")
    if loads:
        plot_language_load(loads, folder / "language_load.png")
    console.print(f"[green]✓[/] {', '.join(sorted(path.name for path in folder.iterdir()))} are in {folder}")


def language_loads(study: Study, folders: Dict[str, Path]) -> Dict[str, "LanguageLoad"]:
    """By router, which experts each target language uses on the test set; empty if there is one target language."""
    if study.test is None or study.test.languages is None:
        return {}
    from fairseq_sparsemixer.tools.language_load import language_load  # loads fairseq

    routed = [router for router in folders if study.routers[router]["router"] != DENSE]
    return {router: language_load(str(folders[router] / BEST)) for router in routed}


def figures(run: Run, folder: Path, loads: Dict[str, "LanguageLoad"]) -> Dict[str, Any]:
    """What fairseq logged of a run, its parameters, its score, and how much its experts specialise by language."""
    test = json.loads((folder / RESULT).read_text(encoding="utf-8"))["test"]
    total, active = _count_parameters(folder / BEST)
    sizes = {"parameters": total, "active_parameters": active}
    bits = fmean(loads[run.name].information()) if run.name in loads else None
    return {
        "router": run.name,
        **run.figures(),
        **sizes,
        "bleu": test["score"],
        "signature": test["signature"],
        "language_bits": bits,
    }


def _count_parameters(checkpoint: Path) -> Tuple[int, int]:
    from fairseq import checkpoint_utils  # seconds to load, and not needed where everything was done before

    from fairseq_sparsemixer.plugin.models import parameter_counts

    (model,), _ = checkpoint_utils.load_model_ensemble([str(checkpoint)])
    return parameter_counts(model)
