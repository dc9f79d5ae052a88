"""Which folders belong to a study, and which of its runs are finished.

OUT/runs/NAME/ has command.txt, the command line for people to read; step.json, the note of resume.py; finally result.json.
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
from fairseq_sparsemixer.tools.study.commands import COMMAND, RESULT, test_command, train_command
from fairseq_sparsemixer.tools.study.grid import Run, Study

CLAIMS = ".claims"  # lock file beside the folders of runs, held while runs are claimed
BRIEFLY = 0.01  # seconds between two attempts to lock it
PLACES = ("--save-dir", "--log-file", "--moe-load-file")  # in the run's own folder, under whatever name that was given
DEVICE = "--cpu"
DATA = "the data"  # the word of a command before its flags
SCORED = "settings"  # in a test's result: the fingerprint of how it was scored


def run_folder(out: Path, run: Run) -> Path:
    """The folder of a run."""
    return out / "runs" / run.name


def is_finished(folder: Path) -> bool:
    """Whether a run is finished and its result can be read; a crash of the machine may leave it incomplete."""
    note = read_note(folder)  # earlier versions wrote no note
    return (note is None or note.finished) and _has_result(folder)


def is_complete(study: Study, run: Run, folder: Path) -> bool:
    """Whether a run is finished, and scored as the study says; trials are not scored."""
    if not is_finished(folder):
        return False
    if study.test is None or run.trial:
        return True
    scored = json.loads((folder / RESULT).read_text(encoding="utf-8")).get("test")
    if not isinstance(scored, dict):
        return False
    if SCORED in scored:
        return scored[SCORED] == scoring(study)
    return ("bits" in scored) == (study.test.metric == "perplexity")  # of an earlier version


def scoring(study: Study) -> str:
    """A fingerprint of how the study scores its runs: the program, its flags, and the reference."""
    assert study.test is not None
    command = test_command(study, Path())
    reference = study.test.reference and hashlib.sha256(study.test.reference.read_bytes()).hexdigest()
    flags = {name: words for name, words in _flags(command).items() if name not in ("--path", DEVICE, DATA)}
    return fingerprint_of({"program": command[0], "flags": flags, "reference": reference})


def check_all(study: Study, runs: Sequence[Run], out: Path) -> None:
    """Refuse folders of runs begun with another command or other data, but for the device: a report may be made elsewhere.

    Raises ConfigurationError, also for unreadable data.
    """
    data = fingerprint_of_data(study.data)
    for run in runs:
        _check(study, run, run_folder(out, run), data, ignored=(DEVICE,))


def claim_all(study: Study, runs: Sequence[Run], out: Path) -> None:
    """Write the notes of a study's new runs; refuse folders begun with another command or other data.

    All folders are checked before any note is written. Raises ConfigurationError for a refused or unwritable folder, and for
    unreadable data.
    """
    data = fingerprint_of_data(study.data)
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        # two studies may start at the same time
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
    """Mark a claimed run as finished, after its result is written. Raises OSError."""
    note = read_note(folder)
    if note is not None:
        write_note(folder, note._replace(finished=True))


def fingerprint_of_data(folder: Path) -> str:
    """A hash of a folder's dictionaries and of the sizes of its splits: it changes if other text is binarised into it.

    Raises ConfigurationError if they cannot be read.
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


def _check(study: Study, run: Run, folder: Path, data: str, ignored: Sequence[str] = ()) -> None:
    path = folder / COMMAND
    if not path.exists():
        return
    try:
        words = shlex.split(path.read_text(encoding="utf-8"))
    except ValueError:  # not text, or an unclosed quote
        raise ConfigurationError(f"{path} is not a command line; give another --out, or delete {folder}") from None
    command = train_command(study, run, folder)
    before, now, note = _flags(words), _flags(command), read_note(folder)
    moved = () if note is None else (DATA,)  # the note knows their content
    for flag in sorted({*before, *now} - {*PLACES, *moved, *ignored}):
        if before.get(flag) != now.get(flag):
            raise ConfigurationError(
                f"{folder} was begun with other flags, {before.get(flag, f'no {flag}')} where the study now has"
                f" {now.get(flag, f'no {flag}')}; give another --out, or delete the folder"
            )
    if note is not None and note.settings != fingerprint_of(_settings(words, data)):
        raise ConfigurationError(
            f"{folder} was begun with other data than {study.data} has now; give another --out, or delete the folder"
        )


def _flags(command: List[str]) -> Dict[str, str]:
    """{"--lr": "--lr 0.1", ...} of a command, without --user-dir: the package may have moved."""
    flags: Dict[str, str] = {}
    name = DATA
    for word in command[1:]:
        name = word if word.startswith("--") else name
        flags[name] = f"{flags[name]} {word}" if name in flags else word
    flags.pop("--user-dir", None)
    return flags
