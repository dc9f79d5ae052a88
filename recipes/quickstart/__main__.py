"""`make quickstart`: dense, Switch and SparseMixer transformers on the same data, seed and budget, from raw text to a table.

The data is an English-German corpus of dates, amounts and names made from Unicode CLDR, or Multi30k's raw files
(--raw-dir). Finished steps are not done again; a run that was killed goes on from its last checkpoint.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import yaml
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.moe.gates import DENSE, gate_class
from fairseq_sparsemixer.options import in_flags
from fairseq_sparsemixer.tools.study.claims import is_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import test_command, train_command
from fairseq_sparsemixer.tools.study.runner import progress_display, run_study
from fairseq_sparsemixer.tools.study.spec import Study, read_study
from fairseq_sparsemixer.tools.study.spec_file import merged, read_spec_file
from recipes.common.cldr import make_cldr
from recipes.common.corpus import Corpus
from recipes.common.pairs import make_data
from recipes.common.progress import format_command, script
from recipes.common.session import check_numbers, file_errors_said, keep_apart, run_as_program
from recipes.common.steps import run_step
from recipes.multi30k_en_de.raw_text import read_multi30k
from recipes.quickstart.report import report

STUDY = Path(__file__).with_name("study.yaml")
ROUTERS = ("dense", "switch", "sparsemixer")
BASELINE = "switch"
WIDTH = 120  # where there is no terminal
LEAST_PAIRS = 1_000  # there are some 900 bare names
HELD_OUT = 500  # pairs in CLDR's valid and test split; fewer beside a small training split


class Text(NamedTuple):
    """Raw text, and what suits it. source: what it is made from, so that other text is another step."""

    title: str
    read: Callable[[], Corpus]
    source: Dict[str, Any]
    vocabulary: int
    flags: Dict[str, Any]


def parse_options(arguments: Optional[List[str]]) -> argparse.Namespace:
    """See --help. Raises ConfigurationError for values that make no experiment, before anything is done."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--raw-dir", type=Path, help="folder with Multi30k's raw files (default: make the CLDR corpus)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/quickstart, or runs/multi30k)")
    parser.add_argument("--updates", type=int, help="updates of each model (default: 400, or 3,000 for Multi30k)")
    parser.add_argument("--pairs", type=int, default=24_000, help="training pairs of the CLDR corpus (default: %(default)s)")
    parser.add_argument("--routers", nargs="+", default=ROUTERS, metavar="ROUTER", help="models to train (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the CLDR corpus and of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    check_numbers(options, {"updates": 1, "pairs": LEAST_PAIRS, "seed": 1})
    with in_flags():
        for router in options.routers:
            if router != DENSE:
                gate_class(router)
    return options


def main(arguments: Optional[List[str]] = None) -> None:
    """The whole experiment."""
    options = parse_options(arguments)
    out = options.out or Path("runs", "quickstart" if options.raw_dir is None else "multi30k")
    keep_apart(options.raw_dir, out)
    with file_errors_said(out):
        compare(options, out)


def compare(options: argparse.Namespace, out: Path) -> None:
    """Prepare the data, train and translate with each router, and report."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    text = text_of(options)
    settings = {**text.source, "vocabulary": text.vocabulary}
    make = partial(make_data, text.read, text.vocabulary, 1, split_digits=True)
    run_step(f"data: {text.title}", out / "data", settings, console, make)
    study = write_study(options, text, out / "study.yaml")
    show(study, out, console)
    with progress_display(console) as progress:
        failures = run_study(study, out, workers=None, progress=progress)  # one a core
    if failures:
        raise ConfigurationError("; ".join(failures))
    console.rule("[bold]results[/]", align="left")
    report(study, out, console)


def text_of(options: argparse.Namespace) -> Text:
    """The raw text that was asked for. Multi30k has more words, in freer sentences: it takes more updates, and dropout."""
    if options.raw_dir is not None:
        source: Dict[str, Any] = {"raw": str(options.raw_dir.resolve())}
        flags: Dict[str, Any] = {"max-update": options.updates or 3000, "dropout": 0.1}
        return Text("Multi30k, English-German", partial(read_multi30k, options.raw_dir), source, 4000, flags)
    held_out = min(HELD_OUT, options.pairs // 40)
    sizes = {"train": options.pairs, "valid": held_out, "test": held_out}
    source = {"sizes": sizes, "seed": options.seed}
    flags = {"max-update": options.updates} if options.updates else {}
    return Text("Unicode CLDR, English-German", partial(make_cldr, sizes, options.seed), source, 1000, flags)


def write_study(options: argparse.Namespace, text: Text, path: Path) -> Study:
    """study.yaml with the data, seed, budget and routers that were asked for."""
    routers = list(dict.fromkeys(options.routers))
    content = {
        **merged(read_spec_file(STUDY), {"flags": text.flags, "test": {"reference": "data/raw/test.de"}}),
        "title": text.title,
        "data": "data/bin",
        "variants": {router: {"router": router} for router in routers},
        "seeds": [options.seed],
        "baseline": BASELINE if BASELINE in routers else routers[0],
    }
    write_whole(path, yaml.safe_dump(content, sort_keys=False))
    return read_study(path)


def show(study: Study, out: Path, console: Console) -> None:
    """Say of each run that it was done before, or print the commands that it is."""
    for run in study.runs():
        folder = run_folder(out, run)
        if is_finished(folder):
            console.print(f"[green]✓[/] train {run.router}, translate [dim](done before, in {folder})[/]")
            continue
        console.rule(f"[bold]train {run.router}, translate[/]", align="left")
        for name, *words in (train_command(study, run, folder), test_command(study, folder)):
            console.print(format_command([script(name), *words]), style="cyan", soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    run_as_program(main)
