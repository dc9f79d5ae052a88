"""Programs that ours start, and do not leave behind.

subprocess.Popen(command, env=child_environment(), preexec_fn=die_with_parent())
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional

from fairseq_sparsemixer.tools.machine import usable_cores, visible_cores

INTERRUPTED = 130  # exit status, as shells have it after Ctrl-C
ERROR = re.compile(r"^(fairseq-sparsemixer: |[\w.]*(Error|Exception)\b|\S+: error: )")
TAIL = 65536  # bytes of output that surely hold the last error
LONGEST = 300  # characters of an error to repeat
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# looked up here: between fork and exec, where other threads may have held locks, as little as possible is done
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


def die_with_parent(number: int = signal.SIGKILL) -> Optional[Callable[[], None]]:
    """A preexec_fn for subprocess.Popen: Linux sends the child this signal when its parent ends, however that ends.

    Strictly, when the thread that started the child ends: start it from one that waits for it. None where there is no Linux.
    """
    if PRCTL is None:
        return None
    parent, end = os.getpid(), os._exit

    def ask() -> None:
        PRCTL(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # it has ended since the fork, and no signal will come
            end(1)

    return ask


def child_environment(threads: Optional[int] = None) -> Dict[str, str]:
    """This process's environment for one that computes on a machine with other work; what the user has set is kept.

    threads: OpenMP's, for one of several processes side by side (default: as many as torch takes, or the quota of CPU time of
    a container where that is less). Waiting threads sleep: spinning ones take the time of those that they wait for.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if threads is None and usable_cores() < visible_cores():
        threads = usable_cores()
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(max(threads, 1)))
    return environment


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


def stop(processes: List[subprocess.Popen], patience: float = 5, first: int = signal.SIGTERM) -> None:
    """End those still running: first politely, then, `patience` seconds later, for good.

    first: SIGINT for Python programs with worker processes of their own, which they end on a KeyboardInterrupt alone.
    """
    for number in dict.fromkeys((first, signal.SIGTERM, signal.SIGKILL)):
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
