"""Atomic file writes."""

import errno
import os
import secrets
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Optional, Union

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".tmp"  # suffix of files still being written


def write_whole(path: Path, content: Union[str, bytes]) -> None:
    """Replace the content of `path` atomically: readers see the old content or the new, even if the writer is killed.

    A symbolic link is kept and its target replaced. A device or pipe is written to directly. Raises OSError.
    """
    write_all({path: content})


def write_all(contents: Mapping[Path, Union[str, bytes]]) -> None:
    """Write several files as write_whole does; none of them if one cannot be written, except devices and pipes.

    Raises OSError with the file's path as its filename.
    """
    finished = []
    with ExitStack() as stack:
        for path, content in contents.items():
            data = content.encode("utf-8") if isinstance(content, str) else content
            try:
                if is_special(path):
                    _write_to_device(path, data)
                    continue
                target = os.path.realpath(path)
                unfinished = stack.enter_context(unfinished_beside(target))
                Path(unfinished).write_bytes(data)
                _flush_to_disk(unfinished)  # before any file is replaced, as some disks are found full only now
                if os.path.isdir(target):
                    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            except OSError as error:
                error.filename = str(path)
                raise
            finished.append((unfinished, target))
        for unfinished, target in finished:
            finish(unfinished, target)


def _write_to_device(path: Path, data: bytes) -> None:
    """A pipe without a reader raises an error instead of blocking."""
    with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as file:
        os.set_blocking(file.fileno(), True)
        file.write(data)


def is_special(path: Union[str, os.PathLike]) -> bool:
    """Whether `path` exists and is neither a file nor a folder: a device, pipe or socket."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def overwritten(read: Iterable[str], written: Iterable[str]) -> Optional[str]:
    """The first path in `written` that is the same file as one in `read`, links resolved; None if there is none."""
    for path in written:
        if os.path.exists(path) and any(os.path.exists(source) and os.path.samefile(source, path) for source in read):
            return path
    return None


@contextmanager
def unfinished_beside(path: str) -> Iterator[str]:
    """Yield the name of a new, unique file beside `path`; it is deleted on exit unless `finish` renamed it.

    The file is locked in the meantime: see is_abandoned. Raises OSError.
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
    """Flush a written file to disk, then rename it to `path`. Raises OSError."""
    _flush_to_disk(unfinished)
    os.replace(unfinished, path)
    _flush_to_disk(os.path.dirname(os.path.abspath(path)))  # makes the rename durable


@contextmanager
def unfinished_folder_beside(path: Union[str, os.PathLike]) -> Iterator[str]:
    """Yield the name of a new folder beside `path`; it is deleted on exit unless `finish_folder` renamed it. Raises OSError."""
    unfinished = f"{os.path.realpath(path)}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}"
    os.mkdir(unfinished)
    try:
        yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def finish_folder(unfinished: str, path: Union[str, os.PathLike]) -> None:
    """Flush a folder of files to disk, then rename it to `path`, whose former content is deleted afterwards. Raises OSError.

    Killed in between, `path` may be missing, but never has a part of the files.
    """
    target, former = os.path.realpath(path), f"{unfinished}.former"
    for name in os.listdir(unfinished):
        _flush_to_disk(os.path.join(unfinished, name))
    _flush_to_disk(unfinished)
    if os.path.isdir(target):
        os.replace(target, former)
    os.replace(unfinished, target)
    _flush_to_disk(os.path.dirname(target))
    shutil.rmtree(former, ignore_errors=True)


def is_abandoned(unfinished: str) -> bool:
    """Whether no process is still writing this file; False if that cannot be determined."""
    try:
        descriptor = os.open(unfinished, os.O_RDWR)
    except OSError:
        return False
    try:
        return _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed or its process exits; False if another holds the lock or locks are unsupported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # held by another, or no locks on this file system or platform
        return False
    return True


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
