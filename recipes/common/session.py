"""The command line of a recipe, `python -m recipes.NAME prepare|train|evaluate`: options, steps, --dry-run."""

import argparse
import json
import logging
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import torch
import yaml
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.moe.gates import DENSE, GATES
from fairseq_sparsemixer.plugin.models.router_options import named_options
from fairseq_sparsemixer.tools.programs import INTERRUPTED, interrupted_by_sigterm
from recipes.common.progress import Meter, format_command, run_program
from recipes.common.steps import fingerprint, finished, run_step, state_of

WIDTH = 120  # columns if there is no terminal
TEXT_VARIABLE = "SPARSEMIXER_DATA"  # a folder with multi30k/ and wikitext2/, for --smoke
CHOICES = ("cldr", "smoke")  # options for other data, which has an output folder of its own
DOWNLOADS = "downloads"  # in a recipe's output folder
# smallest valid value of the numeric options of this module and the recipes
LEAST = {
    **dict.fromkeys(("workers", "num_experts", "updates", "nodes", "device_tokens", "vocabulary"), 1),
    **dict.fromkeys(("seed", "gpus"), 0),
}
LARGEST = 2**32 - 1  # largest seed that numpy accepts


class Session:
    """One call of a recipe. options: see _parser. out: the folder for all output."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.options = name, options
        chosen = "".join(f"-{choice}" for choice in CHOICES if getattr(options, choice, False))
        self.out: Path = options.out or Path("runs", name + chosen)
        self.console = Console(width=None if sys.stdout.isatty() else WIDTH)

    @property
    def data(self) -> Path:
        """The output folder of `prepare`."""
        return self.out / "data"

    @property
    def run(self) -> Path:
        """The folder of a training run: one per router with its options, number of experts and seed."""
        options = self.options
        chosen = "".join(f"-{name}_{value}" for name, value in named_options(options.router, options.router_option).items())
        experts = "" if options.router == DENSE else f"-e{options.num_experts}"
        return self.out / f"{options.router}{chosen}{experts}-seed{options.seed}"

    @property
    def small(self) -> bool:
        """Whether `prepare` takes the small text of smoke.py; the files of --raw-dir are taken as they are."""
        return self.options.smoke and self.options.raw_dir is None

    @property
    def gpus(self) -> int:
        """GPUs per machine; 0 to run on the CPU."""
        return torch.cuda.device_count() if self.options.gpus is None else self.options.gpus

    def step(self, title: str, folder: Path, settings: Dict[str, Any], does: str, action: Callable, *arguments: Any) -> None:
        """Run a step with steps.run_step. With --dry-run, only print `does`."""
        if not self.options.dry_run:
            run_step(title, folder, settings, self.console, action, *arguments)
        else:
            self.say(f"[bold]{title}[/] [dim]({state_of(folder, settings)})[/]")
            self.console.print(f"  {does} -> {folder}", highlight=False, markup=False)

    def command(
        self, title: str, folder: Path, command: List[str], settings: Dict[str, Any], meter: Optional[Meter] = None
    ) -> None:
        """A step that runs a command. With --dry-run, only print the command."""
        if not self.options.dry_run:
            log = folder / "console.log"
            run_step(title, folder, settings, self.console, lambda *_: run_program(command, log, self.console, meter))
        else:
            self.say(f"[bold]{title}[/] [dim]({state_of(folder, settings)})[/]")
            self.show(command)

    def show(self, command: List[str]) -> None:
        """Print a command in a form to paste into a shell."""
        self.console.print(format_command(command), style="cyan", soft_wrap=True, highlight=False, markup=False)

    def needs(self, folder: Path, command: str) -> str:
        """The fingerprint of a folder's finished step. Raises ConfigurationError, naming the command to run, if there is none."""
        if not finished(folder) and not self.options.dry_run:
            raise ConfigurationError(f"{folder} is missing or incomplete; run first: python -m recipes.{self.name} {command}")
        return fingerprint(folder)

    def results(self, figures: Dict[str, Any], suffix: str = "") -> None:
        """Write the results of an evaluation to RUN-results.json in the session's folder, and print those that are not tables."""
        path = self.out / f"{self.run.name}{suffix}-results.json"
        write_whole(path, json.dumps(figures, indent=2) + "\n")
        for name, value in figures.items():
            if isinstance(value, dict):
                continue
            self.console.print(f"  {name}: {value:,.4g}" if isinstance(value, float) else f"  {name}: {value}", highlight=False)
        self.say(f"[green]✓[/] {path}")

    def say(self, text: str) -> None:
        """Print a line with rich markup."""
        self.console.print(text, highlight=False)


class Recipe(NamedTuple):
    """A recipe as passed to `main`: its settings for fairseq-hydra-train, three actions, and add_options for its own options."""

    name: str
    config: Path
    description: str
    prepare: Callable[[Session], None]
    train: Callable[[Session], None]
    evaluate: Callable[[Session], None]
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None


def main(recipe: Recipe, arguments: Optional[Sequence[str]] = None) -> None:
    """Run the recipe's command line."""
    options = _parser(recipe).parse_args(arguments)
    check_numbers(options, LEAST)
    if options.router != DENSE and options.router not in GATES:
        raise ConfigurationError(f"--router {options.router} is unknown; choose from {', '.join([DENSE, *sorted(GATES)])}")
    if options.router == DENSE and options.router_option:
        raise ConfigurationError(f"--router-option {options.router_option} does not work with --router {DENSE}; leave it out")
    named_options(options.router, options.router_option)  # refuses what the router does not take
    session = Session(recipe.name, options)
    keep_apart(options.raw_dir, session.out)
    with file_errors_said(session.out):
        getattr(recipe, options.action)(session)


def entry(recipe: Recipe) -> None:
    """Run `main` as a program."""
    run_as_program(lambda: main(recipe))


def run_as_program(action: Callable[[], None]) -> None:
    """Run `action`. Ctrl-C, or SIGTERM from a batch system, stops it and its child processes with a one-line message."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    try:
        with interrupted_by_sigterm():
            action()
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        sys.exit(INTERRUPTED)


def check_numbers(options: argparse.Namespace, least: Dict[str, int]) -> None:
    """Raise ConfigurationError for a numeric option below its smallest valid value or above LARGEST."""
    for name, smallest in least.items():
        value = getattr(options, name, None)
        if value is not None and not smallest <= value <= LARGEST:
            flag = name.replace("_", "-")
            raise ConfigurationError(f"--{flag} {value} must be at least {smallest:,} and at most {LARGEST:,}")


def keep_apart(raw: Optional[Path], out: Path) -> None:
    """Raise ConfigurationError if the raw data is inside the output folder, except in its downloads."""
    if raw is None:
        return
    inner, outer = Path(os.path.realpath(raw)), Path(os.path.realpath(out))
    if outer in inner.parents and inner.relative_to(outer).parts[0] != DOWNLOADS:
        raise ConfigurationError(f"--raw-dir {raw} is inside --out {out}, where the recipe writes; choose another --out")


@contextmanager
def file_errors_said(out: Path) -> Iterator[None]:
    """Turn file errors (disk full, folder read-only or removed) into a ConfigurationError."""
    try:
        yield
    except OSError as error:
        what = error.filename or out
        raise ConfigurationError(f"{what} cannot be used ({error.strerror or error}); fix it, or choose another --out") from None


def _parser(recipe: Recipe) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m recipes.{recipe.name}",
        description=recipe.description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("prepare", "train", "evaluate"), help="the three steps, in this order")
    parser.add_argument("--raw-dir", type=Path, metavar="DIR", help="use the raw data in DIR instead of downloading it")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"output folder (default: runs/{recipe.name})")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what each step would do, and the commands of train and evaluate"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny data and model: two minutes on a CPU")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes for preparing text")
    group = parser.add_argument_group("train and evaluate")
    group.add_argument("--router", default="sparsemixer", metavar="R", help="router, see docs/routers.md (default: %(default)s)")
    group.add_argument("--router-option", metavar="NAME=VALUE[,...]", help="the router's options, as for fairseq-train")
    num_experts = yaml.safe_load(recipe.config.read_text(encoding="utf-8"))["model"]["num_experts"]
    group.add_argument(
        "--num-experts", type=int, default=num_experts, metavar="E", help="experts per MoE layer (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, default=1, metavar="N", help="training seed (default: %(default)s)")
    group.add_argument("--updates", type=int, metavar="N", help="training updates (default: the recipe's)")
    group.add_argument("--gpus", type=int, metavar="N", help="GPUs per machine, 0 for the CPU (default: all)")
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="machines; several need --slurm (default: %(default)s)")
    group.add_argument("--device-tokens", type=int, metavar="N", help="max tokens per device at once (default: the recipe's)")
    group.add_argument("--slurm", type=Path, metavar="FILE", help="train: write a SLURM batch script instead of training")
    recipe.add_options(parser)
    return parser


def real_text(name: str) -> Optional[Path]:
    """The folder $SPARSEMIXER_DATA/name with real text for --smoke; None if it does not exist."""
    folder = os.environ.get(TEXT_VARIABLE)
    return Path(folder, name) if folder and Path(folder, name).is_dir() else None
