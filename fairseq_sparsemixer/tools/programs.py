"""Starts, watches and stops child programs.

run: run a program to completion, with its output in a file. follow: the same, reading each line. running: run it for the
duration of a block. running_together, first_failure: run several in parallel. On Linux, a child is killed when its parent
ends, however that ends.
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

INTERRUPTED = 130  # exit status after Ctrl-C, as in shells
ERROR = re.compile(r"^(fairseq-sparsemixer: |[\w.]*(Error|Exception)\b|\S+: error: )")
TAIL = 65536  # bytes at the end of the output in which to find the last error
LONGEST = 300  # characters of an error to report
INTERVAL = 0.5  # seconds between checks of a running program
PR_SET_PDEATHSIG = 1  # of Linux's prctl
# looked up here, since as little as possible should run between fork and exec, when other threads may have held locks
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None


class ProgramFailed(Exception):
    """A program exited with a nonzero status. reason: in one line, from its output."""

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
    """Run a program to completion, with its output in `log`, opened in `mode`.

    watch is called every `interval` seconds, and at the end. keep: descriptors of files that the program keeps open too, such
    as a lock. Raises ProgramFailed; ConfigurationError if the program does not exist; and, after stopping the program, what
    watch raises.
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
    """Run a program to completion; append each line of its output to `log`, and pass it to `read`.

    Raises as `run` does, and OSError, after stopping the program, if the log cannot be written.
    """
    pipe: Dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    pipe.update(text=True, encoding="utf-8", errors="replace")
    with log.open("a", encoding="utf-8") as file:
        start = file.seek(0, os.SEEK_END)
        # on SIGINT, fairseq-preprocess stops its workers too
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
    """Run programs for the duration of the block; however it ends, programs that are still running are stopped.

    environment: child_environment() by default. first: see stop. streams: passed to subprocess.Popen. Raises
    ConfigurationError if a program does not exist.
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
    """running_together for a single program."""
    with running_together([command], *arguments, **streams) as (process,):
        yield process


@contextmanager
def _signals_held() -> Iterator[Callable[[], None]]:
    """Block SIGINT and SIGTERM until the block ends; yields a function that unblocks them, for a child.

    Python discards what a signal handler raises in the hooks around a fork (logging has some), so the signal would be lost.
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
        raise ConfigurationError(
            f"{command[0]} cannot be started ({error.strerror}); is it installed in this environment?"
        ) from None


def first_failure(processes: Sequence[subprocess.Popen], grace: float) -> Optional[int]:
    """Wait until all have ended, or until `grace` seconds after one failed. Returns that one's index; None if none failed."""
    deadline = 0.0  # set once one has failed
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

    To be exact, when the thread that started the child ends, so that thread must wait for it. None on other systems.
    """
    if PRCTL is None:
        return None
    parent, end = os.getpid(), os._exit

    def ask() -> None:
        PRCTL(PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:  # the parent ended after the fork, so no signal will come
            end(1)

    return ask


def child_environment(threads: Optional[int] = None) -> Dict[str, str]:
    """This process's environment for a child that shares the machine with others; the user's settings are kept.

    threads: of OpenMP, for one of several parallel processes (default: torch's own number, or a container's CPU quota if that
    is lower). Waiting threads sleep: spinning ones would take CPU time from the threads they wait for.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    if threads is None and usable_cores() < visible_cores():
        threads = usable_cores()
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(max(threads, 1)))
    return environment


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM, with which batch systems end a job, raise KeyboardInterrupt as Ctrl-C does, so that cleanup runs."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop(processes: List[subprocess.Popen], patience: float = 5, first: int = signal.SIGTERM) -> None:
    """Stop those still running: send `first`, SIGTERM and SIGKILL, `patience` seconds apart.

    first: SIGINT for Python programs that stop their own worker processes only on a KeyboardInterrupt.
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
    """Why a program with this exit status failed, in one line: a signal, or the last error in its output after byte `start`."""
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + (", possibly out of memory" if name == "SIGKILL" else "")
    with output.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(start, size - TAIL))
        lines = [line.rstrip() for line in file.read().decode("utf-8", "replace").split("\n") if line.strip()]
    last = next((line for line in reversed(lines) if ERROR.match(line)), lines[-1].strip() if lines else "it printed nothing")
    return last[:LONGEST]
