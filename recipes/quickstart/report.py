"""The end of the quickstart: a table of the runs, on screen and as Markdown and JSON, and two plots."""

import json
from pathlib import Path
from typing import Any, Dict, List

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_sparsemixer.tools.machine import describe_machine
from fairseq_sparsemixer.tools.plotting import plot_expert_load, plot_valid_loss
from fairseq_sparsemixer.tools.runs import Run

COLUMNS = {
    "router": "{router}",
    "parameters": "{parameters:,}",
    "active": "{active_parameters:,}",
    "updates": "{updates:,}",
    "valid loss": "{valid_loss:.3f}",
    "sacreBLEU": "{bleu:.1f}",
    "expert load entropy": "{load_entropy:.3f}",
}
# no speeds: runs that come one after the other, or are interrupted, have met a machine with more or less other work
LEGEND = (
    "active: parameters that one token meets. valid loss: label-smoothed cross-entropy, bits per token, the best validation."
    " expert load entropy: of the tokens' shares, over log E; 1 is even."
)


def report(results: List[Dict[str, Any]], runs: List[Run], data: str, folder: Path, console: Console) -> None:
    """Show the table; write results.md, results.json, valid_loss.png and expert_load.png to folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [[_cell(form, result) for form in COLUMNS.values()] for result in results]
    notes = [f"sacreBLEU {results[0]['signature']}", LEGEND, f"{data}; {describe_machine()}"]
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *rows)]
    (folder / "results.md").write_text("\n".join(lines) + "\n\n" + "\n\n".join(notes) + "\n", encoding="utf-8")
    content = {"data": data, "machine": describe_machine(), "results": results}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    plot_valid_loss(runs, folder / "valid_loss.png")
    plot_expert_load(runs, folder / "expert_load.png")
    console.print(f"[green]✓[/] results.md, results.json, valid_loss.png and expert_load.png are in {folder}")


def _cell(form: str, result: Dict[str, Any]) -> str:
    try:
        return form.format(**result)
    except TypeError:  # a figure that this run does not have: a dense model's expert load
        return "-"
