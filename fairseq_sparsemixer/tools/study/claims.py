"""Which folders are a study's own, and which of its runs are finished.

OUT/runs/NAME/ has command.txt, the command line to read, and step.json, what resume.py knows of it; result.json at the end.
"""

import hashlib
import json
import shlex
import time
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.resume import Note, fingerprint_of, locked, read_note, write_note
from fairseq_sparsemixer.tools.study.commands import COMMAND, RESULT, train_command
from fairseq_sparsemixer.tools.study.grid import Run, Study

CLAIMS = ".claims"  # beside the folders of runs: the lock under which they are given away
BRIEFLY = 0.01  # seconds between two tries to get it


def run_folder(out: Path, run: Run) -> Path:
    """The folder of a run."""
    return out / "runs" / run.name


def is_finished(folder: Path) -> bool:
    """Whether a run was finished, and its result is there; one that a crash of the machine left in pieces is none."""
    note = read_note(folder)  # an earlier version wrote none
    return (note is None or note.finished) and _has_result(folder)


def claim_all(study: Study, runs: Sequence[Run], out: Path) -> None:
    """Note what new runs of a study are; a folder begun with another command or data is somebody else's.

    All is looked at before any is noted. Raises ConfigurationError for such a folder, one that cannot be written, and data that
    cannot be read.
    """
    data = fingerprint_of_data(study.data)
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        # of two studies that start together, one is first
        with locked(out / "runs" / CLAIMS, partial(time.sleep, BRIEFLY)):
            for run in runs:
                _check(study, run, run_folder(out, run), data)
            for run in runs:
                _claim(study, run, run_folder(out, run), data)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        what = getattr(error, "filename", None) or out
        raise ConfigurationError(f"{what} cannot be written ({getattr(error, 'strerror', error)}); give another --out") from None


def note_finished(folder: Path) -> None:
    """Note that a claimed run's result is written. Raises OSError."""
    note = read_note(folder)
    if note is not None:
        write_note(folder, note._replace(finished=True))


def fingerprint_of_data(folder: Path) -> str:
    """What changes when other text is binarised into a folder: its dictionaries, and the sizes of its splits.

    Raises ConfigurationError where they cannot be read.
    """
    try:
        sizes = {path.name: path.stat().st_size for kind in ("*.bin", "*.idx") for path in folder.glob(kind)}
        words = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("dict.*")}
    except OSError as error:
        raise ConfigurationError(f"{error.filename} cannot be read ({error.strerror}); prepare the data again") from None
    return fingerprint_of({"sizes": sizes, "words": words})


def _has_result(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / RESULT).read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _settings(command: List[str], data: str) -> Dict[str, Any]:
    return {"flags": _flags(command), "data": data}


def _claim(study: Study, run: Run, folder: Path, data: str) -> None:
    folder.mkdir(exist_ok=True)
    command = train_command(study, run, folder)
    if not (folder / COMMAND).exists():
        write_whole(folder / COMMAND, shlex.join(command) + "\n")
    if read_note(folder) is None:
        write_note(folder, Note(fingerprint_of(_settings(command, data)), finished=_has_result(folder)))


def _check(study: Study, run: Run, folder: Path, data: str) -> None:
    path = folder / COMMAND
    if not path.exists():
        return
    try:
        words = shlex.split(path.read_text(encoding="utf-8"))
    except ValueError:  # no text, or quotes that do not end
        raise ConfigurationError(f"{path} is not a command line; give another --out, or delete {folder}") from None
    command = train_command(study, run, folder)
    before, now = _flags(words), _flags(command)
    for flag in sorted({*before, *now}):
        if before.get(flag) != now.get(flag):
            raise ConfigurationError(
                f"{folder} was begun with other flags, {before.get(flag, f'no {flag}')} where the study now has"
                f" {now.get(flag, f'no {flag}')}; give another --out, or delete the folder"
            )
    note = read_note(folder)
    if note is not None and note.settings != fingerprint_of(_settings(command, data)):
        raise ConfigurationError(
            f"{folder} was begun with other data than {study.data} has now; give another --out, or delete the folder"
        )


def _flags(command: List[str]) -> Dict[str, str]:
    """{"--lr": "--lr 0.1", ...} of a command, the place of the package left out: it may be moved."""
    flags: Dict[str, str] = {}
    name = "the data"
    for word in command[1:]:
        name = word if word.startswith("--") else name
        flags[name] = f"{flags[name]} {word}" if name in flags else word
    flags.pop("--user-dir", None)
    return flags
