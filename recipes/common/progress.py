"""Runs other programs, shows their progress, and appends all their output to a log file."""

import os
import shlex
import sys
from collections import deque
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.programs import ProgramFailed, follow

LAST_LINES = 15  # lines of a failed program's output to show
WIDTH = 110  # columns of a printed command


class Advance(NamedTuple):
    """A program's progress: units completed, and a note such as the loss."""

    completed: int
    note: str


class Meter(NamedTuple):
    """Measures a program's progress towards `total` of `unit`. read_line: a line of output -> Advance, or None."""

    total: int
    unit: str
    read_line: Callable[[str], Optional[Advance]]


def script(name: str) -> str:
    """The path of one of this Python's console scripts, relative to the working directory if it is inside it."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else path


def format_command(command: List[str]) -> str:
    """The command for a shell, with line breaks before flags and hydra overrides."""
    lines = [""]
    for word in command:
        quoted = shlex.quote(word)
        if (word.startswith("--") or "=" in word) and len(lines[-1]) > WIDTH - 30:
            lines.append("   ")
        lines[-1] += (" " if lines[-1] else "") + quoted
    return " \\\n".join(lines)


def run_program(command: List[str], log: Path, console: Console, meter: Optional[Meter] = None) -> None:
    """Print the command, run it and show its progress; append its output to log.

    If the program fails, prints the last lines of its output and raises ConfigurationError.
    """
    console.print(format_command(command), style="cyan", soft_wrap=True, highlight=False, markup=False)
    tail: deque = deque(maxlen=LAST_LINES)

    def read(line: str) -> None:
        tail.append(line)
        display.read(line)

    try:
        with _Display(meter, console) as display:
            follow(command, log, read)
    except ProgramFailed as error:
        console.print("".join(tail), markup=False, highlight=False)
        name = Path(command[0]).name
        raise ConfigurationError(f"{name} failed with status {error.status}; full output: {log}") from None


class _Display:
    """A progress bar on a terminal, one line per Advance elsewhere; nothing without a meter."""

    def __init__(self, meter: Optional[Meter], console: Console):
        self.meter, self.console = meter, console
        self.bar: Optional[Progress] = None
        if meter is not None and console.is_terminal:
            text = TextColumn(meter.unit + ", {task.description}")
            self.bar = Progress(BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("starting", total=meter.total)

    def __enter__(self) -> "_Display":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def read(self, line: str) -> None:
        if self.meter is None:
            return
        advance = self.meter.read_line(line)
        if advance is None:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=advance.completed, description=advance.note)
        else:
            self.console.print(
                f"  {advance.completed}/{self.meter.total} {self.meter.unit}, {advance.note}", markup=False, highlight=False
            )
