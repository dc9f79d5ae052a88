"""Locks a checkpoint folder against a second training run, which exits with an error naming the first."""

import atexit
import errno
import functools
import logging
import os
import socket
from typing import Any, Callable, Dict, Optional, Tuple

import fairseq_cli.train

from fairseq_sparsemixer.errors import ConfigurationError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

NAME = ".training.lock"
TAKEN = (errno.EACCES, errno.EAGAIN)

_held: Dict[str, Tuple[int, int]] = {}  # folder -> (process that locked it, which may have forked, and its open file)


def lock_folder(folder: str) -> None:
    """Lock the folder until `release_folders` or the end of this process, however it ends; idempotent.

    Raises ConfigurationError if another process holds the lock. Only warns if the file system does not support locks.
    """
    folder = os.path.realpath(folder)
    if _held.get(folder, (None,))[0] == os.getpid():
        return
    descriptor = None
    while descriptor is None:
        descriptor = _open_and_lock(os.path.join(folder, NAME), folder)
    if descriptor >= 0:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        _held[folder] = (os.getpid(), descriptor)


def _open_and_lock(path: str, folder: str) -> Optional[int]:
    """The open lock file; -1 if locks are unsupported; None if the previous holder has just removed the file.

    Uses a lock that forked workers do not inherit, since they may outlive this process by seconds. The process would lose
    it by closing any other descriptor of the same file, so there is never a second one.
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
            raise ConfigurationError(
                f"--save-dir {folder} is in use by {holder}, which is training; wait until that ends, or give another folder"
            ) from None
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
    for folder, (process, descriptor) in list(_held.items()):
        del _held[folder]
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
