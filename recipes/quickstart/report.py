"""The end of the quickstart: a table of the runs, on screen and as Markdown and JSON, and two plots."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Tuple

from rich.console import Console

from fairseq_sparsemixer.tools.machine import describe_machine
from fairseq_sparsemixer.tools.plotting import plot_expert_load, plot_valid_loss
from fairseq_sparsemixer.tools.runs import Run, read_run
from fairseq_sparsemixer.tools.study.claims import run_folder
from fairseq_sparsemixer.tools.study.commands import BEST, RESULT
from fairseq_sparsemixer.tools.study.spec import Study
from fairseq_sparsemixer.tools.tables import cell, markdown_table

COLUMNS = {
    "router": "{}",
    "parameters": "{:,}",
    "active": "{:,}",
    "updates": "{:,}",
    "valid loss": "{:.3f}",
    "sacreBLEU": "{:.1f}",
    "expert load entropy": "{:.3f}",
}
FIGURES = ("router", "parameters", "active_parameters", "updates", "valid_loss", "bleu", "load_entropy")  # of the columns
# no speeds: runs that come one after the other, or are interrupted, have met a machine with more or less other work
LEGEND = (
    "active: parameters that one token uses. valid loss: label-smoothed cross-entropy, bits per token, best validation."
    " expert load entropy: entropy of per-expert token shares / log E (1 = balanced)."
)


def report(study: Study, out: Path, console: Console) -> None:
    """Show the table of a finished study; write results.md, results.json, valid_loss.png and expert_load.png to out/results."""
    folders = {run.router: run_folder(out, run) for run in study.runs()}
    runs = [replace(read_run(folder), name=router) for router, folder in folders.items()]
    results = [figures(run, folder) for run, folder in zip(runs, folders.values())]
    rows = [[cell(form, result[name]) for name, form in zip(FIGURES, COLUMNS.values())] for result in results]
    notes = [f"sacreBLEU {results[0]['signature']}", LEGEND, f"{study.title}; {describe_machine()}"]
    text = "\n\n".join([markdown_table(list(COLUMNS), rows), *notes])
    console.print(text, markup=False, highlight=False)

    folder = out / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    content = {"data": study.title, "machine": describe_machine(), "results": results}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_valid_loss(runs, folder / "valid_loss.png")
    plot_expert_load(runs, folder / "expert_load.png")
    console.print(f"[green]✓[/] results.md, results.json, valid_loss.png and expert_load.png are in {folder}")


def figures(run: Run, folder: Path) -> Dict[str, Any]:
    """What fairseq logged of a run, its parameters, and its score."""
    test = json.loads((folder / RESULT).read_text(encoding="utf-8"))["test"]
    total, active = _count_parameters(folder / BEST)
    sizes = {"parameters": total, "active_parameters": active}
    return {"router": run.name, **run.figures(), **sizes, "bleu": test["score"], "signature": test["signature"]}


def _count_parameters(checkpoint: Path) -> Tuple[int, int]:
    from fairseq import checkpoint_utils  # seconds to load, and not needed where everything was done before

    from fairseq_sparsemixer.plugin.models import parameter_counts

    (model,), _ = checkpoint_utils.load_model_ensemble([str(checkpoint)])
    return parameter_counts(model)
