"""What was run in a folder, with which inputs, and whether it is finished; and a lock against a second writer.

FOLDER/step.json has a fingerprint of the settings, `finished`, and the files that the step made, where it lists them. It is
written in one piece: after a kill it says what it said before, or what it was to say.
"""

import errno
import fcntl
import hashlib
import json
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, NamedTuple, Optional

from fairseq_sparsemixer.files import write_whole

NOTE = "step.json"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system that has none


class Note(NamedTuple):
    """settings: their fingerprint. files: {name: [size, time of change]} of what was made."""

    settings: str
    finished: bool
    files: Dict[str, Any] = {}


def fingerprint_of(settings: Dict[str, Any]) -> str:
    """A few letters that other settings do not have."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_note(folder: Path) -> Optional[Note]:
    """The note of a folder; None where there is none, or one that is damaged."""
    path = folder / NOTE
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    valid = isinstance(content, dict) and isinstance(content.get("settings"), str) and isinstance(content.get("finished"), bool)
    if not valid:
        return None
    files = content.get("files")
    return Note(content["settings"], content["finished"], files if isinstance(files, dict) else {})


def write_note(folder: Path, note: Note) -> None:
    """Note it. Raises OSError."""
    write_whole(folder / NOTE, json.dumps(note._asdict()))


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[IO]:
    """Hold the lock that is this file; it is free as soon as nobody has the file open, however its holder ended.

    wait: called, to take its time or to raise, for as long as another holds it. Raises OSError where the file cannot be made.
    """
    with path.open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
        yield lock
