"""Files that are whole or not there."""

import os
import secrets
from contextlib import contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Optional, Union

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".tmp"  # ends the name of a file that is being written


def write_whole(path: Path, content: Union[str, bytes]) -> None:
    """Give `path` this content in one piece: whoever reads it, whenever the writer is killed, finds the old one or the new.

    A link stays one, and the file that it names gets the content. A device or pipe is written to. Raises OSError.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    if is_special(path):
        # a pipe that nobody reads is an error instead of a wait
        with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
            os.set_blocking(file.fileno(), True)
            file.write(data)
        return
    target = os.path.realpath(path)
    with unfinished_beside(target) as unfinished:
        Path(unfinished).write_bytes(data)
        finish(unfinished, target)


def is_special(path: Union[str, os.PathLike]) -> bool:
    """Whether there is something by that name that is neither a file nor a folder: a device, pipe or socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def overwritten(read: Iterable[str], written: Iterable[str]) -> Optional[str]:
    """The first file to write that is one of those to read, under whatever name; None where there is none."""
    for path in written:
        if os.path.exists(path) and any(os.path.exists(source) and os.path.samefile(source, path) for source in read):
            return path
    return None


@contextmanager
def unfinished_beside(path: str) -> Iterator[str]:
    """The name of a new file beside `path`, which no other writer has; it is gone afterwards unless `finish` renamed it.

    It is locked for this while: see is_abandoned. Raises OSError.
    """
    unfinished = f"{path}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}"
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _try_lock(descriptor)
        yield unfinished
    finally:
        os.close(descriptor)
        if os.path.lexists(unfinished):
            os.remove(unfinished)


def finish(unfinished: str, path: str) -> None:
    """Give a file that is written its name, once its bytes are on the disk. Raises OSError."""
    _flush_to_disk(unfinished)
    os.replace(unfinished, path)
    _flush_to_disk(os.path.dirname(os.path.abspath(path)))  # the name as well


def is_abandoned(unfinished: str) -> bool:
    """Whether nobody writes this file any more; False where that cannot be told."""
    try:
        descriptor = os.open(unfinished, os.O_RDWR)
    except OSError:
        return False
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed, or until its process is gone; False where another has it, or locks are unknown."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # taken, or a file system or platform without locks
        return False
    return True


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
