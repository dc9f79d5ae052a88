"""Plot training runs: validation-loss curves and an expert-load heatmap, and print their figures.

Train with --log-format json --log-file RUN_DIR/train.log --moe-load-file RUN_DIR/load.jsonl.

example:
  fairseq-sparsemixer plot runs/switch runs/sparsemixer --out plots
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from fairseq_sparsemixer.cli.json_file import write_json
from fairseq_sparsemixer.runs import read_run

HELP = "plot validation losses and expert loads of training runs"
COLUMNS = {
    "run": "{}",
    "updates": "{:,}",
    "valid_loss": "{:.3f}",
    "words_per_second": "{:,.0f}",
    "load_entropy": "{:.3f}",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUN_DIR..., --out, --json."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run, with its train.log")
    parser.add_argument("--out", type=Path, default=Path("."), metavar="DIR", help="folder for the PNG files (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write the plots and print a table."""
    from fairseq_sparsemixer.plotting import plot_expert_load, plot_valid_loss  # matplotlib takes a second to load

    runs = [read_run(folder) for folder in options.runs]
    options.out.mkdir(parents=True, exist_ok=True)
    plot_valid_loss(runs, options.out / "valid_loss.png")
    with_load = plot_expert_load(runs, options.out / "expert_load.png")
    figures = [run.figures() for run in runs]
    first, *others = (name.replace("_", " ") for name in COLUMNS)
    table = Table(Column(first, overflow="fold"), *others)  # cut short, the names of runs would be the same
    for row in figures:
        table.add_row(*("-" if row[name] is None else form.format(row[name]) for name, form in COLUMNS.items()))
    console = Console()
    console.print(table)
    console.print(f"wrote {options.out / 'valid_loss.png'}" + (f" and {options.out / 'expert_load.png'}" if with_load else ""))
    if options.json:
        write_json(options.json, figures)
