"""Runs a study: trainings side by side, each in a folder of its own, so that a killed study goes on where it was.

OUT/runs/NAME/ holds train.log, load.jsonl, checkpoints/, what claims.py notes, and at the end result.json, in one piece.
fairseq-train itself resumes from checkpoints/checkpoint_last.pt; a finished run is not touched again. A study that
is interrupted ends its trainings, and on Linux so does one that is killed; elsewhere the next waits for them.
"""

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import Queue
from threading import Event
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools import programs
from fairseq_sparsemixer.tools.machine import describe_machine, usable_cores
from fairseq_sparsemixer.tools.programs import ProgramFailed, child_environment
from fairseq_sparsemixer.tools.resume import locked
from fairseq_sparsemixer.tools.runs import TRAIN_LOG
from fairseq_sparsemixer.tools.study.claims import claim_all, is_finished, note_finished, run_folder
from fairseq_sparsemixer.tools.study.commands import RESULT, executable, test_command, train_command
from fairseq_sparsemixer.tools.study.grid import Run, Study
from fairseq_sparsemixer.tools.study.scores import score
from fairseq_sparsemixer.tools.study.tuning import DIVERGED, tuned, untunable

REFRESH = 0.5  # seconds between two looks at a log
LOCK = "lock"  # in the folder of a run
LINES = 10  # of a run's advance, where there is no terminal for a bar
TAIL = 16384  # bytes of a log that surely hold its last line of figures


class Stopped(Exception):
    """The study is being ended, and what it runs with it."""


def devices(workers: Optional[int]) -> List[Dict[str, str]]:
    """The environment of each place where a run can go: a GPU among those visible, or an equal share of the CPU's cores."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or [*map(str, range(gpus))]
        return [{"CUDA_VISIBLE_DEVICES": visible[index % gpus]} for index in range(workers or gpus)]
    cores = usable_cores()
    workers = workers or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // workers))}] * workers


def _environment(place: Dict[str, str]) -> Dict[str, str]:
    """That of a run's programs in one of the places. Threads are as many as the user has set, where that was done."""
    kept = {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}
    return {**child_environment(), **place, **kept}


def run_study(study: Study, out: Path, workers: Optional[int] = None, progress: Optional[Progress] = None) -> List[str]:
    """Train and score every run that has no result yet. Returns one sentence for each run that failed; the others go on.

    The trials of tuning come first; a model of which one failed is not trained further. An interruption ends what runs, and
    starts nothing more. Raises ConfigurationError when a folder holds a run of other flags, or cannot be written.
    """
    study = tuned(study, out)
    claim_all(study, [*study.trials(), *study.runs()], out)
    failures = _run_all(study, study.trials(), out, workers, progress)
    if study.tune is not None:
        study = tuned(study, out)
        failures += untunable(study, out)
        claim_all(study, study.runs(), out)
    return failures + _run_all(study, study.runs(), out, workers, progress)


def _run_all(study: Study, runs: List[Run], out: Path, workers: Optional[int], progress: Optional[Progress]) -> List[str]:
    """Train and score those of a study's runs that have no result yet, side by side; one sentence for each that failed."""
    runs = [run for run in runs if not is_finished(run_folder(out, run))]
    if not runs:
        return []
    places: "Queue[Dict[str, str]]" = Queue()
    for place in devices(workers):
        places.put(place)
    stopping = Event()

    def work(run: Run) -> Optional[str]:
        place = places.get()
        try:
            failure = _train_and_score(study, run, run_folder(out, run), _environment(place), progress, stopping)
        except Stopped:
            return None
        except ConfigurationError as error:
            failure = f"{run.name} failed: {error.message}"
        except OSError as error:
            failure = f"{run.name} failed: {run_folder(out, run)} cannot be written ({error.strerror or error})"
        finally:
            places.put(place)
        if progress is not None:
            progress.console.print(failure or f"{run.name} is finished", markup=False, highlight=False, soft_wrap=True)
        return failure

    with ThreadPoolExecutor(places.qsize()) as pool:
        try:
            return [failure for failure in pool.map(work, runs) if failure]
        finally:
            stopping.set()  # before the pool waits for its threads: only an interruption finds any at work


def progress_display(console: Optional[Console] = None) -> Progress:
    """A bar a run, in updates; where there is no terminal, a line now and then instead (see _watch)."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
    )


def _train_and_score(
    study: Study, run: Run, folder: Path, environment: Dict[str, str], progress: Optional[Progress], stopping: Event
) -> Optional[str]:
    """None, or the sentence of the failure. Raises Stopped when the study is being ended, OSError when the disk is full."""
    output, scored = folder / "output.txt", folder / "test.txt"
    with locked(folder / LOCK, _waiting(run, progress, stopping)) as lock:
        _end_if(stopping)
        if is_finished(folder):  # by whoever had the lock
            return None
        begun = time.time()
        # the programs hold the lock as well: where they outlive this process, the next study waits for them
        call = partial(programs.run, environment=environment, interval=REFRESH, keep=[lock.fileno()])
        watch = _watch(run, folder, progress, stopping)
        result: Dict[str, Any] = {"run": run.name, "router": run.router, "num_experts": run.num_experts, "seed": run.seed}
        try:
            call(executable(train_command(study, run, folder)), output, "ab", watch=watch)
        except ProgramFailed as failure:
            if not (run.trial and failure.reason.startswith(FloatingPointError.__name__)):
                return f"{run.name} failed in training: {failure.reason} (see {output})"
            result[DIVERGED] = failure.reason
        if study.test is not None and not run.trial:
            try:
                call(executable(test_command(study, folder)), scored, "wb", watch=partial(_end_if, stopping))
                result["test"] = score(study.test, scored)
            except ProgramFailed as failure:
                return f"{run.name} failed in its test: {failure.reason} (see {scored})"
            except ConfigurationError as error:
                return f"{run.name} failed in its test: {error.message}"
        result.update(seconds=round(time.time() - begun, 1), machine=describe_machine())
        write_whole(folder / RESULT, json.dumps(result, indent=2))
        note_finished(folder)
    return None


def _waiting(run: Run, progress: Optional[Progress], stopping: Event) -> Callable[[], None]:
    """A function that waits a while for the lock, which a run's programs hold, too: a training may have outlived its study."""
    told: List[str] = []

    def wait() -> None:
        if progress is not None and not told:
            told.append(run.name)
            progress.console.print(f"{run.name} waits for its training that an earlier study began", highlight=False)
        stopping.wait(REFRESH)
        _end_if(stopping)

    return wait


def _end_if(stopping: Event) -> None:
    """Raise Stopped when the study is being ended: the checkpoint of a training's last save stays."""
    if stopping.is_set():  # Ctrl-C reaches the programs, too
        raise Stopped


def _watch(run: Run, folder: Path, progress: Optional[Progress], stopping: Event) -> Callable[[], None]:
    """A function that shows the last update in the run's log, and raises Stopped when the study is being ended."""
    if progress is None:
        return partial(_end_if, stopping)
    updates: Any = run.flags.get("max-update")
    bar = progress.add_task(run.name, total=updates, loss="")
    lines = not progress.console.is_terminal and isinstance(updates, (int, float))
    said = 0

    def watch() -> None:
        nonlocal said
        _end_if(stopping)
        done, loss = _last_update(folder / TRAIN_LOG)
        progress.update(bar, completed=done, loss=loss)
        if lines and done >= min(said + updates / LINES, updates) > said:
            said = done
            progress.console.print(f"{run.name}: {done}/{updates} updates, {loss}", markup=False, highlight=False)

    return watch


def _last_update(log: Path) -> Tuple[int, str]:
    """The number of updates in the last lines of a log, and the loss in words."""
    if not log.exists():
        return 0, ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        tail = file.read().decode("utf-8", "replace")
    done = re.findall(r'"(?:train_)?num_updates": "(\d+)"', tail)
    losses = re.findall(r'"(?:train_)?loss": "([\d.]+)"', tail)
    return int(done[-1]) if done else 0, f"loss {losses[-1]}" if losses else ""
