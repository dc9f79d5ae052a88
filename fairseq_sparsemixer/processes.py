"""Programs that ours start, and do not leave behind."""

import re
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

INTERRUPTED = 130  # exit status, as shells have it after Ctrl-C
ERROR = re.compile(r"^(fairseq-sparsemixer: |[\w.]*(Error|Exception)\b|\S+: error: )")
TAIL = 65536  # bytes of output that surely hold the last error
LONGEST = 300  # characters of an error to repeat


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, by which batch systems end a job, raise KeyboardInterrupt as Ctrl-C does: what is to be ended gets ended."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(processes: List[subprocess.Popen], patience: float = 5) -> None:
    """End those still running: first politely, then, `patience` seconds later, for good."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = [process for process in processes if process.poll() is None]
        for process in alive:
            process.send_signal(number)
        deadline = time.monotonic() + patience
        for process in alive:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                pass


def why_failed(status: int, output: Path, start: int = 0) -> str:
    """Why a program with this exit status failed, in one line: a signal, or the last error in its output from byte `start` on."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"it was ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")
    with output.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - TAIL))
        lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").split("\n") if line.strip()]
    last = next((line for line in reversed(lines) if ERROR.match(line)), lines[-1].strip() if lines else "it printed nothing")
    return last[:LONGEST]
