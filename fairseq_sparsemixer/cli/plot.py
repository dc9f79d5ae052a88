"""Plot training runs: validation-loss curves and an expert-load heatmap, and print their figures.

Train with --log-format json --log-file RUN_DIR/train.log --moe-load-file RUN_DIR/load.jsonl. With --moe-load-languages, too,
there is a heatmap of language x expert for each layer.

example:
  fairseq-sparsemixer plot runs/switch runs/sparsemixer --out plots
"""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fairseq_sparsemixer.cli.folder import folder
from fairseq_sparsemixer.cli.json_file import as_json, require_json
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import is_special, write_all
from fairseq_sparsemixer.tools.runs import LOAD_LOG, TRAIN_LOG, read_run

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
    parser.add_argument("--out", type=folder, default=Path("."), metavar="DIR", help="folder for the PNG files (default: here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write the plots and print a table. Everything is read, drawn and checked before any file is written."""
    # matplotlib takes a second to load
    from fairseq_sparsemixer.tools.plotting import draw_expert_load, draw_language_load, draw_valid_loss, drawn

    runs = [read_run(folder) for folder in options.runs]
    figures = [run.figures() for run in runs]
    languages = [(run.name, run.load.languages) for run in runs if run.load is not None and run.load.languages is not None]
    plots = {
        "valid_loss.png": draw_valid_loss(runs),
        "expert_load.png": draw_expert_load(runs),
        "language_load.png": draw_language_load(languages) if languages else None,
    }
    images = {options.out / name: drawn(figure) for name, figure in plots.items() if figure is not None}
    logs = [str(folder / name) for folder in options.runs for name in (TRAIN_LOG, LOAD_LOG)]
    require_json(options.json and str(options.json), [*map(str, images), *logs])
    _write(images, options.out, options.json, figures)
    first, *others = (name.replace("_", " ") for name in COLUMNS)
    table = Table(Column(first, overflow="fold"), *others)  # truncated, names of runs could be the same
    for row in figures:
        table.add_row(*("-" if row[name] is None else escape(form.format(row[name])) for name, form in COLUMNS.items()))
    console = Console()
    console.print(table)
    console.print("wrote " + " and ".join(map(str, images)), markup=False)


def _write(images: Dict[Path, bytes], out: Path, json_file: Optional[Path], figures: List[Dict[str, Any]]) -> None:
    """Write all files or, if one cannot be written, none."""
    made = not os.path.isdir(out)
    try:
        for path in images:
            if is_special(path) or path.is_dir() or path.is_symlink():
                raise ConfigurationError(f"--out {out} has {path.name}, which is not a regular file; give another folder")
        out.mkdir(parents=True, exist_ok=True)
        write_all(images if json_file is None else {**images, json_file: as_json(figures)})
    except (OSError, ValueError) as error:
        if made and os.path.isdir(out) and not os.listdir(out):
            out.rmdir()
        if isinstance(error, ConfigurationError):
            raise
        reason = getattr(error, "strerror", None) or error
        if json_file is not None and getattr(error, "filename", None) == str(json_file):
            raise ConfigurationError(f"--json {json_file} cannot be written ({reason}); give another path") from None
        raise ConfigurationError(f"--out {str(out)[:300]} cannot be written ({reason}); give another folder") from None
