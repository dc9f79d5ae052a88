"""Runs a study: trainings side by side, each in a folder of its own, so that a killed study goes on where it was.

OUT/runs/NAME/ holds command.txt, train.log, load.jsonl, checkpoints/, and at the end result.json, written in one piece.
fairseq-train itself resumes from checkpoints/checkpoint_last.pt; a run with result.json is not touched again.
"""

import fcntl
import json
import os
import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, Callable, Dict, IO, List, Optional

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.machine import describe_machine
from fairseq_sparsemixer.runs import TRAIN_LOG
from fairseq_sparsemixer.study.commands import COMMAND, RESULT, executable, test_command, train_command
from fairseq_sparsemixer.study.scores import score
from fairseq_sparsemixer.study.spec import Run, Study

REFRESH = 0.5  # seconds between two looks at a log
TAIL = 16384  # bytes of a log that surely hold its last line of figures


def run_folder(out: Path, run: Run) -> Path:
    """The folder of a run."""
    return out / "runs" / run.name


def devices(workers: Optional[int]) -> List[Dict[str, str]]:
    """The environment of each place where a run can go: a GPU, or an equal share of the CPU's cores."""
    gpus = torch.cuda.device_count()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": str(index % gpus)} for index in range(workers or gpus)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // workers))}] * workers


def run_study(study: Study, out: Path, workers: Optional[int] = None, progress: Optional[Progress] = None) -> List[str]:
    """Train and score every run that has no result yet. Returns one sentence for each run that failed; the others go on.

    Raises ConfigurationError when a folder holds a run of other flags.
    """
    runs = [run for run in study.runs() if not (run_folder(out, run) / RESULT).exists()]
    for run in runs:
        _claim(study, run, run_folder(out, run))
    places: "Queue[Dict[str, str]]" = Queue()
    for place in devices(workers):
        places.put(place)

    def work(run: Run) -> Optional[str]:
        place = places.get()
        try:
            return _train_and_score(study, run, run_folder(out, run), {**os.environ, **place}, progress)
        finally:
            places.put(place)

    with ThreadPoolExecutor(places.qsize()) as pool:
        return [failure for failure in pool.map(work, runs) if failure]


def progress_display() -> Progress:
    """A bar a run, in updates."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )


def _claim(study: Study, run: Run, folder: Path) -> None:
    """Note the command of a new run; a folder begun with another one is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    command, note = shlex.join(train_command(study, run, folder)) + "\n", folder / COMMAND
    if note.exists() and note.read_text(encoding="utf-8") != command:
        raise ConfigurationError(
            f"{folder} was begun with other flags (see its {COMMAND}); give another --out, or delete the folder"
        )
    note.write_text(command, encoding="utf-8")


def _train_and_score(
    study: Study, run: Run, folder: Path, environment: Dict[str, str], progress: Optional[Progress]
) -> Optional[str]:
    begun = time.time()
    # the child holds the lock too: a study started again waits for trainings that outlived the one before
    with (folder / "lock").open("w") as lock, (folder / "output.txt").open("ab") as output:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _call(train_command(study, run, folder), environment, lock, output, _watch(study, run, folder, progress)):
            return f"{run.name} failed in training; see {folder / 'output.txt'}"
        result: Dict[str, Any] = {"run": run.name, "router": run.router, "num_experts": run.num_experts, "seed": run.seed}
        if study.test is not None:
            scored = folder / "test.txt"
            with scored.open("wb") as test_output:
                if not _call(test_command(study, folder), environment, lock, test_output):
                    return f"{run.name} failed in its test; see {scored}"
            result["test"] = score(study.test, scored)
        result.update(seconds=round(time.time() - begun, 1), machine=describe_machine())
        write_whole(folder / RESULT, json.dumps(result, indent=2))
    return None


def _call(
    command: List[str], environment: Dict[str, str], lock: IO, output: IO, watch: Optional[Callable[[], None]] = None
) -> bool:
    process = subprocess.Popen(
        executable(command), env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()]
    )
    try:
        while not _ended_within(process, REFRESH):
            if watch is not None:
                watch()
    finally:
        if process.poll() is None:  # interrupted: the checkpoint of the last save stays
            process.terminate()
            process.wait()
    return process.returncode == 0


def _ended_within(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _watch(study: Study, run: Run, folder: Path, progress: Optional[Progress]) -> Optional[Callable[[], None]]:
    """A function that moves the run's bar to the last update in its log."""
    if progress is None:
        return None
    updates = run.flags.get("max-update")
    bar = progress.add_task(run.name, total=updates, loss="")

    def watch() -> None:
        log = folder / TRAIN_LOG
        if log.exists():
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - TAIL))
                tail = file.read().decode("utf-8", "replace")
            done = re.findall(r'"(?:train_)?num_updates": "(\d+)"', tail)
            losses = re.findall(r'"(?:train_)?loss": "([\d.]+)"', tail)
            progress.update(bar, completed=int(done[-1]) if done else 0, loss=f"loss {losses[-1]}" if losses else "")

    return watch
