"""Runs a study: trainings side by side, each in its own folder, so that a killed study can be resumed.

OUT/runs/NAME/ holds train.log, load.jsonl, checkpoints/, the notes of claims.py, and finally result.json, written atomically.
fairseq-train itself resumes from checkpoints/checkpoint_last.pt; a finished run is never changed. An interrupted study stops
its trainings. If the study is killed, Linux ends them, too; elsewhere the next study waits for them.
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
from fairseq_sparsemixer.tools.study.claims import SCORED, claim_all, is_complete, is_finished, note_finished, run_folder, scoring
from fairseq_sparsemixer.tools.study.commands import RESULT, executable, test_command, train_command
from fairseq_sparsemixer.tools.study.curve import read_validated
from fairseq_sparsemixer.tools.study.grid import Run, Study
from fairseq_sparsemixer.tools.study.scores import score
from fairseq_sparsemixer.tools.study.tuning import DIVERGED, tuned, untunable

REFRESH = 0.5  # seconds between two reads of a log
LOCK = "lock"  # in the folder of a run
LINES = 10  # of progress per run, if there is no terminal
TAIL = 16384  # bytes at the end of a log that contain its last line of figures


class Stopped(Exception):
    """The study is being stopped."""


def devices(workers: Optional[int]) -> List[Dict[str, str]]:
    """The environment of each worker: one of the visible GPUs, or an equal share of the CPU's cores."""
    gpus = torch.cuda.device_count()
    if gpus:
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or [*map(str, range(gpus))]
        return [{"CUDA_VISIBLE_DEVICES": visible[index % gpus]} for index in range(workers or gpus)]
    cores = usable_cores()
    workers = workers or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // workers))}] * workers


def _environment(place: Dict[str, str]) -> Dict[str, str]:
    """The environment of a worker's programs; a number of threads that the user has set is kept."""
    kept = {name: value for name, value in os.environ.items() if name == "OMP_NUM_THREADS"}
    return {**child_environment(), **place, **kept}


def run_study(study: Study, out: Path, workers: Optional[int] = None, progress: Optional[Progress] = None) -> List[str]:
    """Train and score every run without a result. Returns one sentence for each failed run; the others continue.

    The trials of tuning come first; if one fails, its model is not trained further. An interruption stops all programs. Raises
    ConfigurationError if a folder holds a run with other flags, or cannot be written.
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
    """Train and score the given runs without a result, side by side. Returns one sentence for each failed run."""
    runs = [run for run in runs if not is_complete(study, run, run_folder(out, run))]
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
            stopping.set()  # before the pool waits for its threads; some still work only after an interruption


def progress_display(console: Optional[Console] = None) -> Progress:
    """A progress bar per run, in updates; without a terminal, a few lines instead (see _watch)."""
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
    """None, or why the run failed. Raises Stopped if the study is being stopped, OSError if the disk is full."""
    output, scored = folder / "output.txt", folder / "test.txt"
    with locked(folder / LOCK, _waiting(run, progress, stopping)) as lock:
        _end_if(stopping)
        if is_complete(study, run, folder):  # by the previous holder of the lock
            return None
        begun = time.time()
        # the programs hold the lock, too: if they outlive this process, the next study waits for them
        call = partial(programs.run, environment=environment, interval=REFRESH, keep=[lock.fileno()])
        watch = _watch(run, folder, progress, stopping)
        result: Dict[str, Any] = {"run": run.name, "router": run.router, "num_experts": run.num_experts, "seed": run.seed}
        trained = is_finished(folder)  # and only to be scored, as the study's test has changed
        if trained:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        try:
            if not trained:
                call(executable(train_command(study, run, folder)), output, "ab", watch=watch)
                read_validated(folder)  # or there is nothing to report
        except ProgramFailed as failure:
            if not (run.trial and failure.reason.startswith(FloatingPointError.__name__)):
                return f"{run.name} failed in training: {failure.reason} (see {output})"
            result[DIVERGED] = failure.reason
        if study.test is not None and not run.trial:
            try:
                call(executable(test_command(study, folder)), scored, "wb", watch=partial(_end_if, stopping))
                result["test"] = {**score(study.test, scored), SCORED: scoring(study)}
            except ProgramFailed as failure:
                return f"{run.name} failed in its test: {failure.reason} (see {scored})"
            except ConfigurationError as error:
                return f"{run.name} failed in its test: {error.message}"
        if not trained:
            result.update(seconds=round(time.time() - begun, 1), machine=describe_machine())
        write_whole(folder / RESULT, json.dumps(result, indent=2))
        note_finished(folder)
    return None


def _waiting(run: Run, progress: Optional[Progress], stopping: Event) -> Callable[[], None]:
    """A function that waits for the lock of a run, which a training that outlived its study may hold."""
    told: List[str] = []

    def wait() -> None:
        if progress is not None and not told:
            told.append(run.name)
            progress.console.print(f"{run.name} waits for its training, begun by an earlier study", highlight=False)
        stopping.wait(REFRESH)
        _end_if(stopping)

    return wait


def _end_if(stopping: Event) -> None:
    """Raise Stopped if the study is being stopped; the last checkpoint of a training is kept."""
    if stopping.is_set():  # Ctrl-C also reaches the programs
        raise Stopped


def _watch(run: Run, folder: Path, progress: Optional[Progress], stopping: Event) -> Callable[[], None]:
    """A function that shows the last update in the run's log, and raises Stopped if the study is being stopped."""
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
    """The number of updates and the loss, as text, from the last lines of a log."""
    if not log.exists():
        return 0, ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        tail = file.read().decode("utf-8", "replace")
    done = re.findall(r'"(?:train_)?num_updates": "(\d+)"', tail)
    losses = re.findall(r'"(?:train_)?loss": "([\d.]+)"', tail)
    return int(done[-1]) if done else 0, f"loss {losses[-1]}" if losses else ""
