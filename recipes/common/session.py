"""One call of a recipe: `python -m recipes.NAME prepare|train|evaluate`, its options, and its steps, done or only said."""

import argparse
import json
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.moe.gates import DENSE, GATES
from fairseq_sparsemixer.tools.programs import INTERRUPTED, interrupted_by_sigterm
from recipes.common.progress import Meter, format_command, run_program
from recipes.common.steps import fingerprint, finished, run_step, state_of

WIDTH = 120  # where there is no terminal
TEXT_VARIABLE = "SPARSEMIXER_DATA"  # a folder with multi30k/ and wikitext2/, for --smoke
DOWNLOADS = "downloads"  # in a recipe's folder
# options that are numbers, of this module and of the recipes, and the least that makes sense
LEAST = {
    **dict.fromkeys(("workers", "num_experts", "updates", "nodes", "device_tokens", "vocabulary"), 1),
    **dict.fromkeys(("seed", "gpus"), 0),
}
LARGEST = 2**32 - 1  # numpy's largest seed


class Session:
    """options: see add_options. out: the folder of everything that the recipe makes."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options = name, options
        self.out: Path = options.out or Path("runs", name + ("-smoke" if options.smoke else ""))
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)

    @property
    def data(self) -> Path:
        """What `prepare` makes."""
        return self.out / "data"

    @property
    def run(self) -> Path:
        """The folder of a training run: one for each router, number of experts and seed."""
        router, experts = self.options.router, "" if self.options.router == DENSE else f"-e{self.options.num_experts}"
        return self.out / f"{router}{experts}-seed{self.options.seed}"

    @property
    def gpus(self) -> int:
        """GPUs of a machine; 0 to run on the CPU."""
        return torch.cuda.device_count() if self.options.gpus is None else self.options.gpus

    def step(self, title: str, folder: Path, settings: Dict[str, Any], does: str, action: Callable, *arguments: Any) -> None:
        """A step of steps.run_step. `does` says what for --dry-run, which does nothing else."""
        if not self.options.dry_run:
            run_step(title, folder, settings, self.console, action, *arguments)
        else:
            self.say(f"[bold]{title}[/] [dim]({state_of(folder, settings)})[/]")
            self.console.print(f"  {does} -> {folder}", highlight=False, markup=False)

    def command(
        self, title: str, folder: Path, command: List[str], settings: Dict[str, Any], meter: Optional[Meter] = None
    ) -> None:
        """A step that runs a command; --dry-run prints it."""
        if not self.options.dry_run:
            log = folder / "console.log"
            run_step(title, folder, settings, self.console, lambda *_: run_program(command, log, self.console, meter))
        else:
            self.say(f"[bold]{title}[/] [dim]({state_of(folder, settings)})[/]")
            self.show(command)

    def show(self, command: List[str]) -> None:
        """Print a command for a shell."""
        self.console.print(format_command(command), style="cyan", soft_wrap=True, highlight=False, markup=False)

    def needs(self, folder: Path, command: str) -> str:
        """The fingerprint of the step that filled a folder. Raises ConfigurationError, naming the command, where none has."""
        if not finished(folder) and not self.options.dry_run:
            raise ConfigurationError(f"{folder} is missing or unfinished; run first: python -m recipes.{self.name} {command}")
        return fingerprint(folder)

    def results(self, figures: Dict[str, Any], suffix: str = "") -> None:
        """Show the figures of an evaluation, and write them to RUN-results.json in the session's folder."""
        path = self.out / f"{self.run.name}{suffix}-results.json"
        write_whole(path, json.dumps(figures, indent=2) + "\n")
        for name, value in figures.items():
            self.console.print(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}", highlight=False)
        self.say(f"[green]✓[/] {path}")

    def say(self, text: str) -> None:
        """A line for the user, with rich's markup."""
        self.console.print(text, highlight=False)


class Recipe(NamedTuple):
    """What a recipe's __main__.py hands to `main`. The three steps; add_options: the recipe's own options."""

    name: str
    description: str
    prepare: Callable[[Session], None]
    train: Callable[[Session], None]
    evaluate: Callable[[Session], None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(recipe: Recipe, arguments: Optional[Sequence[str]] = None) -> None:
    """The recipe's command line."""
    options = _parser(recipe).parse_args(arguments)
    check_numbers(options, LEAST)
    if options.router != DENSE and options.router not in GATES:
        raise ConfigurationError(f"--router {options.router} is unknown; choose from {', '.join([DENSE, *sorted(GATES)])}")
    session = Session(recipe.name, options)
    keep_apart(options.raw_dir, session.out)
    with file_errors_said(session.out):
        getattr(recipe, options.action)(session)


def entry(recipe: Recipe) -> None:
    """`main` as a program."""
    run_as_program(lambda: main(recipe))


def run_as_program(action: Callable[[], None]) -> None:
    """Run it; Ctrl-C, and the SIGTERM of a batch system, end it and what it has started with a sentence."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    try:
        with interrupted_by_sigterm():
            action()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


def check_numbers(options: argparse.Namespace, least: Dict[str, int]) -> None:
    """Raise ConfigurationError for a number among the options that is below its least value, or larger than any use of it."""
    for name, smallest in least.items():
        value = getattr(options, name, None)
        if value is not None and not smallest <= value <= LARGEST:
            flag = name.replace("_", "-")
            raise ConfigurationError(f"--{flag} {value} must be at least {smallest:,} and at most {LARGEST:,}")


def keep_apart(raw: Optional[Path], out: Path) -> None:
    """Raise ConfigurationError where raw data lie among what is written; what was downloaded there may be."""
    if raw is None:
        return
    inner, outer = Path(os.path.realpath(raw)), Path(os.path.realpath(out))
    if outer in inner.parents and inner.relative_to(outer).parts[0] != DOWNLOADS:
        raise ConfigurationError(f"--raw-dir {raw} lies in --out {out}, where the recipe writes; give another --out")


@contextmanager
def file_errors_said(out: Path) -> Iterator[None]:
    """Let a full disk, a folder that is read-only or gone, and the like end in a sentence."""
    try:
        yield
    except OSError as error:
        what = error.filename or out
        raise ConfigurationError(f"{what} cannot be used ({error.strerror or error}); mend that, or give another --out") from None


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{recipe.name}",
        description=recipe.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("prepare", "train", "evaluate"), help="the three parts, in this order")
    parser.add_argument("--raw-dir", type=Path, metavar="DIR", help="raw data that is there already: nothing is downloaded")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder of everything made (default: runs/{recipe.name})")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what each step would do; of train and evaluate, print the command"
    )
    parser.add_argument("--smoke", action="store_true", help="a size that runs on a CPU in two minutes")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes that prepare text")
    group = parser.add_argument_group("train and evaluate")
    group.add_argument("--router", default="sparsemixer", metavar="R", help="see docs/routers.md (default: %(default)s)")
    group.add_argument("--num-experts", type=int, default=4, metavar="E", help="in each MoE layer (default: %(default)s)")
    group.add_argument("--seed", type=int, default=1, metavar="N", help="of training (default: %(default)s)")
    group.add_argument("--updates", type=int, metavar="N", help="updates of training (default: the recipe's)")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs of a machine, 0 for the CPU (default: all there are)")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; several need --slurm (default: %(default)s)")
    group.add_argument("--device-tokens", type=int, metavar="N", help="tokens that fit a device at once (default: the recipe's)")
    group.add_argument("--slurm", type=Path, metavar="FILE", help="train: write a batch script for SLURM instead of training")
    recipe.add_options(parser)
    return parser


def real_text(name: str) -> Optional[Path]:
    """The folder `name` of the real text for --smoke, in $SPARSEMIXER_DATA; None where there is none."""
    folder = os.environ.get(TEXT_VARIABLE)
    return Path(folder, name) if folder and Path(folder, name).is_dir() else None
