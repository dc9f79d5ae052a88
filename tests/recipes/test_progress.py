"""Running programs, with progress and logs."""

import io
import shlex
import sys

import pytest
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.progress import Advance, Meter, format_command, run_program


def read_line(line):
    return Advance(int(line.split()[1]), "going") if line.startswith("at ") else None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_programs_progress_is_shown_and_its_output_logged(tmp_path, terminal):
    screen = io.StringIO()
    command = [sys.executable, "-c", "print('hello'); print('at 3'); print('at 5')"]
    run_program(command, tmp_path / "log", Console(file=screen, force_terminal=terminal, width=200), Meter(5, "steps", read_line))
    assert (tmp_path / "log").read_text() == "hello\nat 3\nat 5\n"
    assert "5/5" in screen.getvalue() and "going" in screen.getvalue()


def test_a_failure_shows_the_last_output_and_names_the_log(tmp_path):
    screen = io.StringIO()
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(ConfigurationError, match="failed with status 3; full output: .*log"):
        run_program(command, tmp_path / "log", Console(file=screen))
    assert "the reason" in screen.getvalue().splitlines()


def test_a_printed_command_can_be_pasted_into_a_shell():
    command = ["fairseq-train", "data", "--adam-betas", "(0.9,0.98)", "--lr", "0.1", *(f"--flag{n}" for n in range(40))]
    text = format_command(command)
    assert len(text.splitlines()) > 3
    assert shlex.split(text.replace("\\\n", " ")) == command
