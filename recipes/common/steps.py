"""Resumable steps: a finished step is skipped, a step with changed settings starts over.

A step fills a folder, and stores a stamp there with its settings and the files it made. Only these files are ever removed,
and only if the folder has no others: a folder of the user, with a checkpoint, or changed since is refused with an error.
"""

import os
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.resume import NOTE, Note, fingerprint_of, locked, read_note, write_note

STAMP = NOTE
WAIT = 0.5  # seconds between attempts to take a lock
STARTS_OVER = "starts over, as settings changed"
CHECKPOINT = ".pt"
REMEDY = "choose another --out, or delete the folder yourself"


def run_step(title: str, folder: Path, settings: Dict[str, Any], console: Console, action: Callable, *arguments: Any) -> str:
    """Fill folder by action(*arguments, folder, console), unless that was done before with the same settings.

    Returns a fingerprint of the settings, to include in the settings of later steps.
    After a kill, the folder keeps its files, so that action can resume; with other settings, it is emptied first.
    If another process is working in the folder, waits for it to end.
    """
    mark = fingerprint_of(settings)
    if not _done(folder, mark):
        require_usable(folder, settings)
        with _alone_in(folder, console):
            if not _done(folder, mark):  # another process may have done it meanwhile
                console.rule(f"[bold]{title}[/]", align="left")
                _run(folder, settings, action, arguments, console)
                return mark
    console.print(f"[green]✓[/] {title} [dim](done before, in {folder})[/]")
    return mark


def _run(folder: Path, settings: Dict[str, Any], action: Callable, arguments: Tuple[Any, ...], console: Console) -> None:
    begin_step(folder, settings)
    found, note = _files(folder), read_note(folder)
    made = note.files if note else {}
    try:
        action(*arguments, folder, console)
    except BaseException:
        with suppress(OSError):  # a full disk is reported already
            write_note(folder, Note(fingerprint_of(settings), False, _made(folder, found, made)))
        raise
    write_note(folder, Note(fingerprint_of(settings), True, _made(folder, found, made)))


def _done(folder: Path, mark: str) -> bool:
    note = read_note(folder)
    return note is not None and note.settings == mark and note.finished


@contextmanager
def _alone_in(folder: Path, console: Console) -> Iterator[None]:
    """Hold a lock file next to the folder; the folder itself holds only files of the step."""
    told: List[Path] = []

    def wait() -> None:
        if not told:
            told.append(folder)
            console.print(f"waiting for another process, which is working in {folder}", markup=False, highlight=False)
        time.sleep(WAIT)

    with ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock"), wait))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"{folder} cannot be written ({_reason(error)}); choose another --out") from None
        yield


def begin_step(folder: Path, settings: Dict[str, Any]) -> None:
    """Mark the folder as an unfinished step with these settings; remove the files of a step with other settings.

    Raises ConfigurationError, before removing anything, if the folder has files that the step did not make.
    """
    mark, before = fingerprint_of(settings), read_note(folder)
    require_usable(folder, settings)
    made = before.files if before else {}
    try:
        if before is None or before.settings != mark:
            _remove(folder, made)
            made = {}
        folder.mkdir(parents=True, exist_ok=True)
        write_note(folder, Note(mark, False, made))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{folder} cannot be written ({_reason(error)}); choose another --out") from None


def require_usable(folder: Path, settings: Dict[str, Any]) -> None:
    """Raise ConfigurationError if the folder belongs to no step, or has a step with other settings that must not be removed."""
    problem = _problem(folder, settings)
    if problem is not None:
        raise ConfigurationError(problem)


def state_of(folder: Path, settings: Dict[str, Any]) -> str:
    """What run_step would do, as text."""
    problem, before = _problem(folder, settings), read_note(folder)
    if problem is not None:
        return f"would be refused: {problem}"
    if before is not None and before.settings == fingerprint_of(settings):
        return "done before" if before.finished else "resumes"
    return STARTS_OVER if before else "to do"


def finished(folder: Path) -> bool:
    """Whether a step has filled the folder."""
    note = read_note(folder)
    return note is not None and note.finished


def fingerprint(folder: Path) -> str:
    """The fingerprint of the settings of the folder's step; empty if there is none."""
    note = read_note(folder)
    return note.settings if note else ""


def _problem(folder: Path, settings: Dict[str, Any]) -> Optional[str]:
    """Why a step with these settings must not start in the folder; None if it may."""
    try:
        if folder.exists() and not folder.is_dir():
            return f"{folder} is not a folder; choose another --out"
        before, found = read_note(folder), _files(folder)
    except (OSError, ValueError) as error:
        return f"{folder} cannot be read ({_reason(error)}); choose another --out"
    if not found or (before is not None and before.settings == fingerprint_of(settings)):
        return None
    if before is None:
        return f"{folder} has files (such as {next(iter(found))}) but no valid {STAMP}, so no recipe made it; {REMEDY}"
    checkpoint = next((name for name in found if name.endswith(CHECKPOINT)), None)
    if checkpoint is not None:
        return f"{folder} holds a run with other settings and the checkpoint {checkpoint}; {REMEDY}"
    made = before.files
    other = next((name for name, about in found.items() if about is None or made.get(name) != about), None)
    if other is not None:
        return f"{folder} was made with other settings, and its file {other} is new or changed since; {REMEDY}"
    return None


def _remove(folder: Path, made: Dict[str, Any]) -> None:
    """Remove the files that a step made, then empty folders. Does not follow links."""
    if not folder.is_dir():
        return
    for name in _files(folder):  # require_usable has checked that all belong to the step
        if name in made:
            os.unlink(folder / name)
    for path, _, _ in os.walk(folder, topdown=False):
        if path != str(folder) and not os.listdir(path):
            os.rmdir(path)


def _files(folder: Path) -> Dict[str, Optional[List[int]]]:
    """The files below the folder, without the stamp: [size, mtime] of regular files; None for links, pipes and the like."""
    return {os.path.relpath(entry.path, folder): _about(entry) for entry in _walk(str(folder))} if folder.is_dir() else {}


def _walk(folder: str, top: bool = True) -> Iterator[os.DirEntry]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, top=False)
            elif not (top and _is_stamp(entry.name)):
                yield entry


def _is_stamp(name: str) -> bool:
    """Whether the name is the stamp's, or that of a temporary file left when writing the stamp was killed."""
    return name.startswith((STAMP, f".{STAMP}"))


def _about(entry: os.DirEntry) -> Optional[List[int]]:
    if not entry.is_file(follow_symlinks=False):
        return None
    about = entry.stat(follow_symlinks=False)
    return [about.st_size, about.st_mtime_ns]


def _made(folder: Path, found: Dict[str, Any], made: Dict[str, Any]) -> Dict[str, Any]:
    """The files made by a step: those in `made` before, and those that are new or changed since `found`."""
    return {name: about for name, about in _files(folder).items() if name in made or found.get(name) != about}


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
