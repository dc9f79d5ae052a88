"""One call of a recipe: `python -m recipes.NAME prepare|train|evaluate`, its options, and its steps, done or only said."""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.gates import DENSE, GATES
from recipes.progress import Meter, format_command, run_program
from recipes.steps import fingerprint, finished, run_step, state_of

WIDTH = 120  # where there is no terminal
ROOT = Path(__file__).resolve().parent.parent
TEXT_VARIABLE = "SPARSEMIXER_DATA"  # a folder with multi30k/ and wikitext2/, for --smoke


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
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
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
    if options.router != DENSE and options.router not in GATES:
        raise ConfigurationError(f"--router {options.router} is unknown; choose from {', '.join([DENSE, *sorted(GATES)])}")
    getattr(recipe, options.action)(Session(recipe.name, options))


def entry(recipe: Recipe) -> None:
    """`main` as a program: an interruption ends it with a sentence."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    try:
        main(recipe)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from here")


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
    """The folder `name` of the real text for --smoke and tests: in $SPARSEMIXER_DATA, or beside the repository; else None."""
    folder = Path(os.environ.get(TEXT_VARIABLE, ROOT.parent / "shared" / "data")) / name
    return folder if folder.is_dir() else None
