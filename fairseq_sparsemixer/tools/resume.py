"""Records what was run in a folder, with which settings, and whether it finished; and a lock against a second writer.

FOLDER/step.json has a fingerprint of the settings, `finished`, and the files that the step wrote, if it lists them. It is
written atomically: after a kill it has the old content or the new.
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
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # the file system has no locks


class Note(NamedTuple):
    """settings: their fingerprint. files: {name: [size, modification time]} of the files written."""

    settings: str
    finished: bool
    files: Dict[str, Any] = {}


def fingerprint_of(settings: Dict[str, Any]) -> str:
    """A short hash of the settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def read_note(folder: Path) -> Optional[Note]:
    """The note of a folder; None if it is missing or damaged."""
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
    """Write the folder's note. Raises OSError."""
    write_whole(folder / NOTE, json.dumps(note._asdict()))


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[IO]:
    """Hold a lock on this file, which is released once no process has the file open, however its holder ends.

    wait: called repeatedly while another process holds the lock; it sleeps or raises. Raises OSError if the file cannot be
    created.
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
