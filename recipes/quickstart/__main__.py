"""`make quickstart`: dense, Switch and SparseMixer transformers on the same data, seed and budget, from raw text to a table.

The data is an English-German corpus of dates, amounts and names made from Unicode CLDR, or Multi30k's raw files
(--raw-dir). Finished steps are not done again; a run that was killed goes on from its last checkpoint.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import List, Optional

from rich.console import Console

from fairseq_sparsemixer.moe.gates import DENSE, gate_class
from fairseq_sparsemixer.options import in_flags
from fairseq_sparsemixer.tools.runs import read_run
from recipes.common.cldr import make_cldr
from recipes.common.session import check_numbers, file_errors_said, keep_apart, run_as_program
from recipes.common.steps import run_step
from recipes.multi30k_en_de.raw_text import read_multi30k
from recipes.quickstart import pipeline
from recipes.quickstart.report import report

ROUTERS = ("dense", "switch", "sparsemixer")
WIDTH = 120  # where there is no terminal
LEAST_PAIRS = 1_000  # there are some 900 bare names
HELD_OUT = 500  # pairs in CLDR's valid and test split; fewer beside a small training split


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
    check_numbers(options, {"updates": 1, "pairs": LEAST_PAIRS, "seed": 0})
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

    # Data. Multi30k has more words, in freer sentences: it takes more updates, and dropout.
    if options.raw_dir is None:
        name, vocabulary, updates, dropout = "Unicode CLDR, English-German", 1000, options.updates or 400, 0.0
        held_out = min(HELD_OUT, options.pairs // 40)
        sizes = {"train": options.pairs, "valid": held_out, "test": held_out}
        make_corpus, source = partial(make_cldr, sizes, options.seed), {"sizes": sizes, "seed": options.seed}
    else:
        name, vocabulary, updates, dropout = "Multi30k, English-German", 4000, options.updates or 3000, 0.1
        make_corpus, source = partial(read_multi30k, options.raw_dir), {"raw": str(options.raw_dir.resolve())}
    data = out / "data"
    settings = {**source, "vocabulary": vocabulary}
    prepared = run_step(f"data: {name}", data, settings, console, pipeline.prepare, make_corpus, vocabulary)

    # Model, optimiser, evaluation: everything but the router is the same.
    results, runs = [], []
    for router in options.routers:
        run, test = out / router, out / f"{router}-test"
        command = pipeline.train_command(data, run, router, updates, dropout, options.seed)
        settings = {"command": command, "data": prepared}
        trained = run_step(f"train {router}", run, settings, console, pipeline.train, command, updates)
        settings = {"search": pipeline.SEARCH, "model": trained}
        checkpoint = run / "checkpoint_best.pt"
        run_step(f"translate with {router}", test, settings, console, pipeline.translate, data, checkpoint)
        results.append({"router": router, **pipeline.score(data, run, test / "translation.txt")})
        runs.append(read_run(run))

    console.rule("[bold]results[/]", align="left")
    report(results, runs, name, out / "results", console)


if __name__ == "__main__":
    run_as_program(main)
