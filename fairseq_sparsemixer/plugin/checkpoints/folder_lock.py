"""Locks a checkpoint folder against a second training run, which exits with an error naming the first.

A command that would write under the name of one of the folder's checkpoints takes the same lock.
"""

import atexit
import errno
import functools
import logging
import os
import re
import socket
from contextlib import contextmanager, suppress
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import fairseq_cli.train

from fairseq_sparsemixer.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = ".training.lock"
TAKEN = (errno.EACCES, errno.EAGAIN)
OF_A_TRAINING = re.compile(r"checkpoint(\d+|_\d+_\d+|_last|_best|\.best_.+)(-rank-\d+|-shard\d+)*\.pt")  # as fairseq names them

_held: Dict[str, Tuple[int, int]] = {}  # folder -> (process that locked it, which may have forked, and its open file)


class _InUse(Exception):
    """By whom, in words."""


def lock_folder(folder: str) -> None:
    """Lock the folder until `release_folders` or the end of this process, however it ends; idempotent.

    Raises ConfigurationError if another process holds the lock. Only warns if the file system does not support locks.
    """
    folder = os.path.realpath(folder)
    try:
        _take(folder, "is training")
    except _InUse as holder:
        raise ConfigurationError(
            f"--save-dir {folder} is in use by {holder}; wait until that ends, or give another folder"
        ) from None


@contextmanager
def writing_checkpoints(paths: List[str]) -> Iterator[None]:
    """Keep trainings from the folder of these files for this while, where a training may have given them their names.

    Raises ConfigurationError where one is under way there: it and this process would take turns to overwrite the file.
    """
    taken = []
    try:
        for path in filter(_may_be_of_a_training, paths):
            folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
            try:
                taken += [folder] if _take(folder, "is writing a checkpoint there") else []
            except _InUse as holder:
                raise ConfigurationError(
                    f"{path} may be overwritten by {holder}; wait until that ends, or give another OUT"
                ) from None
        yield
    finally:
        for folder in taken:
            _release(folder)


def _may_be_of_a_training(path: str) -> bool:
    return OF_A_TRAINING.fullmatch(os.path.basename(path)) is not None


def _take(folder: str, purpose: str) -> bool:
    """Whether the folder is taken now, and was not before. Raises _InUse where another process has it."""
    if _held.get(folder, (None,))[0] == os.getpid():
        return False
    descriptor = None
    while descriptor is None:
        descriptor = _open_and_lock(os.path.join(folder, NAME), folder)
    if descriptor < 0:
        return False
    with suppress(OSError):  # the note is for whoever comes next; a full disk has no room for it
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, which {purpose}".encode())
    _held[folder] = (os.getpid(), descriptor)
    return True


def _open_and_lock(path: str, folder: str) -> Optional[int]:
    """The open lock file; -1 if locks are unsupported; None if the previous holder has just removed the file.

    Uses a lock that forked workers do not inherit, since they may outlive this process by seconds. The process would lose
    it by closing any other descriptor of the same file, so there is never a second one. Raises _InUse.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        logger.warning("%s is not locked against a second training run (%s)", folder, error.strerror)
        return -1
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (OSError, AttributeError) as error:
        holder = os.read(descriptor, 300).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        if getattr(error, "errno", None) in TAKEN:
            raise _InUse(holder) from None
        logger.warning("%s is not locked against a second training run (its file system has no locks)", folder)
        return -1
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except FileNotFoundError:
        pass
    os.close(descriptor)
    return None


def release_folders() -> None:
    """Release the folders locked by this process."""
    for folder in list(_held):
        _release(folder)


def _release(folder: str) -> None:
    process, descriptor = _held.pop(folder)
    if process == os.getpid():
        try:
            os.remove(os.path.join(folder, NAME))
        except OSError:
            pass  # removed with its folder
        os.close(descriptor)


def released_after(main: Callable) -> Callable:
    """fairseq_cli.train.main that releases its folder, for processes that train more than once."""

    @functools.wraps(main)
    def train(*arguments: Any, **options: Any) -> Any:
        try:
            return main(*arguments, **options)
        finally:
            release_folders()

    return train


def install() -> None:
    """Make fairseq-train release its folder at the end of training."""
    if not hasattr(fairseq_cli.train.main, "__wrapped__"):
        fairseq_cli.train.main = released_after(fairseq_cli.train.main)


atexit.register(release_folders)
