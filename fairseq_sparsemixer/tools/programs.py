"""Programs that ours start, watch, and do not leave behind.

run: to its end, its output in a file. follow: the same, and each line is looked at. running: for as long as a block lasts.
running_together, first_failure: several side by side. On Linux a program ends with the one that started it, however that ends.
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
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.machine import usable_cores, visible_cores

INTERRUPTED = 130  # exit status, as shells have it after Ctrl-C
ERROR = re.compile(r"^(fairseq-sparsemixer: |[\w.]*(Error|Exception)\b|\S+: error: )")
TAIL = 65536  # bytes of output that surely hold the last error
LONGEST = 300  # characters of an error to repeat
INTERVAL = 0.5  # seconds between two looks at a program that runs
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# looked up here: between fork and exec, where other threads may have held locks, as little as possible is done
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


class ProgramFailed(Exception):
    """A program that ended with a status other than 0. reason: why, in one line, as far as its output tells."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def run(
    command: Sequence[str],
    log: Path,
    mode: str = "ab",
    environment: Optional[Dict[str, str]] = None,
    watch: Callable[[], None] = lambda: None,
    interval: float = INTERVAL,
    keep: Sequence[int] = (),
) -> None:
    """Run a program to its end; what it prints goes straight into `log`, opened in `mode`.

    watch is called every `interval` seconds, and at the end; keep: files that the program holds open as well, such as a lock.
    Raises ProgramFailed; ConfigurationError where there is no such program; and what watch raises, once the program is ended.
    """
    with log.open(mode) as file:
        start = file.seek(0, os.SEEK_END)
        with running(command, environment, stdout=file, stderr=subprocess.STDOUT, pass_fds=keep) as process:
            while not _ended_within(process, interval):
                watch()
    watch()
    if process.returncode:
        raise ProgramFailed(process.returncode, why_failed(process.returncode, log, start))


def follow(command: Sequence[str], log: Path, read: Callable[[str], None]) -> None:
    """Run a program to its end; each line that it prints is appended to `log` and handed to `read`.

    Raises as `run` does, and OSError, once the program is ended, for a log that cannot be written.
    """
    pipe: Dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipe.update(text=True, encoding="utf-8", errors="replace")
    with log.open("a", encoding="utf-8") as file:
        start = file.seek(0, os.SEEK_END)
        # at SIGINT fairseq-preprocess ends its workers, too
        with running(command, first=signal.SIGINT, **pipe) as process:
            for line in process.stdout or ():
                file.write(line)
                read(line)
            process.wait()
    if process.returncode:
        raise ProgramFailed(process.returncode, why_failed(process.returncode, log, start))


@contextmanager
def running_together(
    commands: Iterable[Sequence[str]], environment: Optional[Dict[str, str]] = None, first: int = signal.SIGTERM, **streams: Any
) -> Iterator[List[subprocess.Popen]]:
    """Programs while the block lasts; whatever ends the block ends those that have not ended by themselves.

    environment: child_environment() unless given. first: see stop. streams: subprocess.Popen's. Raises ConfigurationError where
    there is no such program.
    """
    environment = child_environment() if environment is None else environment
    processes: List[subprocess.Popen] = []
    try:
        for command in commands:
            with _signals_held() as release:
                processes.append(_started(command, environment, streams, release))
        yield processes
    finally:
        stop(processes, first=first)
        for process in processes:
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def running(command: Sequence[str], *arguments: Any, **streams: Any) -> Iterator[subprocess.Popen]:
    """running_together with a single one."""
    with running_together([command], *arguments, **streams) as (process,):
        yield process


@contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
    """Hold SIGINT and SIGTERM back until the block ends; yields what lets them through again, for a child.

    Python drops what a handler raises in the hooks that it runs around a fork (logging has some): the signal would be lost.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        yield release
    finally:
        release()


def _started(
    command: Sequence[str], environment: Dict[str, str], streams: Dict[str, Any], release: Callable[[], None]
) -> subprocess.Popen:
    ask = die_with_parent()

    def prepare() -> None:
        if ask is not None:
            ask()
        release()

    try:
        return subprocess.Popen(list(command), env=environment, preexec_fn=prepare, **streams)
    except OSError as error:
        raise ConfigurationError(f"{command[0]} was not found ({error.strerror}); is it installed in this environment?") from None


def first_failure(processes: Sequence[subprocess.Popen], grace: float) -> Optional[int]:
    """Wait until all have ended, or `grace` seconds after one has failed: the number of that one; None where none has."""
    deadline = 0.0  # once one has failed
    failed: Optional[int] = None
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = _a_failed_one(processes)
            deadline = time.monotonic() + grace
        elif time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return _a_failed_one(processes) if failed is None else failed


def _a_failed_one(processes: Sequence[subprocess.Popen]) -> Optional[int]:
    return next((number for number, process in enumerate(processes) if process.poll()), None)


def _ended_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


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
