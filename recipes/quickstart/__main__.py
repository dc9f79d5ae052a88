"""`make quickstart`: dense, Switch and SparseMixer transformers on the same data, seed and budget, from raw text to a table.

The data is a corpus of dates, amounts and names made from Unicode CLDR, English into 16 languages or into those given, or
Multi30k's raw files (--raw-dir). Finished steps are skipped; a killed training resumes from its last checkpoint.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import yaml
from rich.console import Console

from fairseq_sparsemixer.cli.unused import refuse_unused
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.moe.gates import DENSE, gate_class
from fairseq_sparsemixer.options import in_flags
from fairseq_sparsemixer.tools.study.claims import is_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import test_command, train_command
from fairseq_sparsemixer.tools.study.runner import progress_display, run_study
from fairseq_sparsemixer.tools.study.grid import Study
from fairseq_sparsemixer.tools.study.spec import read_study
from fairseq_sparsemixer.tools.study.spec_file import merged, read_spec_file
from recipes.common.cldr import MANY, SOURCE, make_cldr, tag
from recipes.common.corpus import LANGUAGES, Corpus
from recipes.common.pairs import make_data
from recipes.common.progress import format_command, script
from recipes.common.session import check_numbers, file_errors_said, keep_apart, run_as_program
from recipes.common.steps import run_step
from recipes.multi30k_en_de.raw_text import read_multi30k
from recipes.quickstart.report import report

STUDY = Path(__file__).with_name("study.yaml")
ROUTERS = ("dense", "switch", "sparsemixer")
BASELINE = DENSE
WIDTH = 120  # where there is no terminal
NAMES = 1_000  # pairs for each target language: there are some 900 bare names
HELD_OUT = 50  # pairs for each of many target languages in CLDR's valid and test split, and ten times as many for one
TOGETHER = "xx"  # fairseq's name of the target side if it has several languages


class Text(NamedTuple):
    """Raw text, and the model that suits it.

    languages: fairseq's names of the two sides. source: what the text is made from; other values are another step.
    pieces: options of sentencepiece. flags: of fairseq-train, where they differ from study.yaml.
    """

    title: str
    languages: Sequence[str]
    read: Callable[[], Corpus]
    source: Dict[str, Any]
    vocabulary: int
    pieces: Dict[str, Any]
    num_experts: int
    flags: Dict[str, Any]


def parse_options(arguments: Optional[List[str]]) -> argparse.Namespace:
    """See --help. Raises ConfigurationError for values that make no experiment, before anything is done."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    targets = f"target languages of the CLDR corpus, of {' '.join(MANY)} (default: all)"
    parser.add_argument("--raw-dir", type=Path, help="folder with Multi30k's raw files (default: make the CLDR corpus)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/quickstart, or runs/multi30k)")
    parser.add_argument("--targets", nargs="+", choices=MANY, metavar="LANGUAGE", help=targets)
    parser.add_argument(
        "--updates", type=int, help="updates of each model (default: 1,000; 400 for one target, 3,000 for Multi30k)"
    )
    parser.add_argument("--pairs", type=int, help="training pairs of the CLDR corpus (default: 64,000, or 24,000 for one target)")
    routers = f"models to train (default: {' '.join(ROUTERS)})"
    parser.add_argument("--routers", nargs="+", default=ROUTERS, metavar="ROUTER", help=routers)
    parser.add_argument("--seed", type=int, default=1, help="of the CLDR corpus and of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.raw_dir is not None:
        refuse_unused(options, "targets pairs", "is for the CLDR corpus, and --raw-dir gives Multi30k")
    options.targets = list(dict.fromkeys(options.targets or MANY))
    options.pairs = options.pairs if options.pairs is not None else 24_000 if len(options.targets) == 1 else 64_000
    check_numbers(options, {"updates": 1, "pairs": NAMES * len(options.targets), "seed": 1})
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
    make = partial(make_data, text.read, text.vocabulary, 1, languages=text.languages, split_digits=True, **text.pieces)
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
    """The requested raw text."""
    budget = {"max-update": options.updates} if options.updates else {}
    if options.raw_dir is not None:
        return multi30k(options.raw_dir, budget)
    return cldr(options.targets, options.pairs, options.seed, budget)


def multi30k(raw_dir: Path, budget: Dict[str, Any]) -> Text:
    """Multi30k. It has more words, in freer sentences, than CLDR: it needs more updates, and dropout."""
    read = partial(read_multi30k, raw_dir)
    flags = {**one_target(LANGUAGES[1]), "dropout": 0.1, "max-update": 3000, **budget}
    return Text("Multi30k, English-German", LANGUAGES, read, {"raw": str(raw_dir.resolve())}, 4000, {}, 4, flags)


def cldr(targets: Sequence[str], pairs: int, seed: int, budget: Dict[str, Any]) -> Text:
    """The CLDR corpus for these target languages."""
    alone = len(targets) == 1
    held_out = HELD_OUT * 10 if alone else HELD_OUT * len(targets)
    held_out = min(held_out, pairs // 40)
    sizes = {"train": pairs, "valid": held_out, "test": held_out}
    source = {"sizes": sizes, "seed": seed, "targets": list(targets)}
    read = partial(make_cldr, sizes, seed, targets)
    if alone:
        name = SOURCE.languages[targets[0]]
        languages, flags = ("en", targets[0]), {**one_target(targets[0]), **budget}
        return Text(f"Unicode CLDR, English-{name}", languages, read, source, 1000, {}, 4, flags)
    title = f"Unicode CLDR, English into {len(targets)} languages"
    return Text(title, ("en", TOGETHER), read, source, 2000, {"user_defined_symbols": [*map(tag, targets)]}, 8, budget)


def one_target(language: str) -> Dict[str, Any]:
    """Flags for one target language: a wider model, since a token needs more of it, with experts in every other layer."""
    sides = ("encoder", "decoder")
    width = {
        f"{side}-{part}": size
        for side in sides
        for part, size in (("embed-dim", 128), ("ffn-embed-dim", 512), ("attention-heads", 4))
    }
    return {"target-lang": language, **width, "moe-freq": 2, "lr": 0.003, "max-update": 400}


def write_study(options: argparse.Namespace, text: Text, path: Path) -> Study:
    """study.yaml with the data, seed, budget and routers that were asked for."""
    routers = list(dict.fromkeys(options.routers))
    source, target = (f"data/raw/test.{language}" for language in text.languages)
    test = {"reference": target, "languages": source if target.endswith(TOGETHER) else None}
    content = {
        **merged(read_spec_file(STUDY), {"flags": text.flags, "test": test}),
        "title": text.title,
        "data": "data/bin",
        "variants": {router: {"router": router} for router in routers},
        "num-experts": [text.num_experts],
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
