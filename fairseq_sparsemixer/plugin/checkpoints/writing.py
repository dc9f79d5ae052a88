"""Atomic checkpoint writes: a reader sees the old file or the new one, complete, even if the writer is killed."""

import errno
import functools
import logging
import os
import re
import shutil
import time
from contextlib import ExitStack
from glob import escape, glob
from typing import Any, Callable, List

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import UNFINISHED, finish, is_abandoned, is_special, overwritten, unfinished_beside

logger = logging.getLogger(__name__)

STAGED = ".staged"  # suffix of files that wait for the files of other ranks: see shards
ATTEMPTS, PAUSE = 3, 2.5  # as in fairseq: a network file system may fail temporarily
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)  # permanent

LEFT_BEHIND = re.compile(rf"checkpoint.*\.pt(?:{re.escape(STAGED)})?(?:\.\d+-[0-9a-f]+)?{re.escape(UNFINISHED)}")

persist_remotely = checkpoint_utils.torch_persistent_save  # fairseq's own, for paths that only iopath supports


def replace_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Let `write` create a file beside `path`, and rename it to `path` once it is on disk. Raises OSError."""
    with unfinished_beside(path) as unfinished:
        write(unfinished)
        finish(unfinished, path)


def save_atomically(obj: Any, path: str) -> None:
    """torch.save that keeps the previous file until the new one is complete; links are followed.

    Retries on temporary disk errors. Raises ConfigurationError if the file cannot be written.
    """
    refuse_special_target(path)
    target = os.path.realpath(path)
    try_again(lambda: replace_atomically(target, lambda unfinished: torch.save(obj, unfinished)), path)


def save_together(paths: List[str], state_of: Callable[[int], Any]) -> None:
    """Write state_of(index) to each path; no file is replaced before all of them are on disk.

    Only one state is held at a time. Raises ConfigurationError if a file cannot be written.
    """
    with ExitStack() as files:
        unfinished = [files.enter_context(unfinished_beside(os.path.realpath(path))) for path in paths]
        for index, name in enumerate(unfinished):
            try_again(functools.partial(torch.save, state_of(index), name), paths[index])
        for name, path in zip(unfinished, paths):
            finish(name, os.path.realpath(path))


def try_again(write: Callable[[], Any], path: str) -> None:
    """Call `write`, retrying on temporary disk errors. Raises ConfigurationError that names `path`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return write()
        except (OSError, RuntimeError) as error:
            if attempt == ATTEMPTS or getattr(error, "errno", None) in LASTING:
                raise cannot_write(path, error) from None
            logger.warning("writing %s failed (%s); retrying", path, error)
            time.sleep(PAUSE)


class Unwritable(ConfigurationError):
    """The disk does not take the file."""


def cannot_write(path: str, error: Exception) -> Unwritable:
    """The user's error for an error of the system or of torch's writer."""
    reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(folder) and getattr(error, "errno", None) not in LASTING:
        reason += f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    return Unwritable(f"{path} cannot be written ({reason}); give another path, or make this one writable")


def make_folder_of(path: str) -> None:
    """Make the folder of a checkpoint to write, if it is missing. Raises Unwritable if it cannot be made."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def refuse_special_target(path: str) -> None:
    """Raise ConfigurationError if `path` exists and is not a regular file."""
    if not path:
        raise ConfigurationError("the name of the checkpoint to write is empty; give a path")
    if os.path.isdir(path) or is_special(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise ConfigurationError(f"{path} is {kind}, not a file; give the name of a file")


def require_targets(written: Any, read: Any) -> None:
    """Raise ConfigurationError, before any work is done, if files cannot be written or would overwrite an input."""
    lost = overwritten(read, written)
    if lost is not None:
        raise ConfigurationError(f"{lost} would be overwritten, but it is an input; choose another OUT")
    if len({os.path.realpath(path) for path in written}) < len(written):
        raise ConfigurationError(f"{written[-1]} would be written twice; give each file its own name")
    for path in written:
        refuse_special_target(path)
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            raise ConfigurationError(f"{path} cannot be written, as the folder {folder} does not exist; create it first")
        try:
            with unfinished_beside(os.path.realpath(path)):
                pass
        except OSError as error:
            raise cannot_write(path, error) from None


def remove_unfinished(folder: str, staged: bool = False) -> None:
    """Remove unfinished files of killed runs from a checkpoint folder; staged: also files that waited for other ranks.

    Files that a process is still writing are kept.
    """
    for path in glob(os.path.join(escape(folder), f"checkpoint*.pt*{UNFINISHED}")):
        if LEFT_BEHIND.fullmatch(os.path.basename(path)) and is_abandoned(path):
            _remove(path)
    for path in glob(os.path.join(escape(folder), f"checkpoint*.pt{STAGED}")) if staged else ():
        _remove(path)


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except FileNotFoundError:
        pass  # another run removed it


def _place(path: str) -> str:
    """The file to write for `path`: a link's target, except that a link to a file in the same folder is replaced."""
    place = os.path.realpath(path)
    return path if os.path.dirname(place) == os.path.realpath(os.path.dirname(path) or ".") else place


def _persist(obj: Any, filename: str, async_write: bool = False) -> None:
    """Replaces fairseq's torch_persistent_save."""
    if async_write or not PathManager.supports_rename(filename):
        persist_remotely(obj, filename, async_write)
        return
    refuse_special_target(filename)
    try_again(lambda: replace_atomically(_place(filename), lambda unfinished: torch.save(obj, unfinished)), filename)


class _AtomicPathManager(PathManager):
    """fairseq's PathManager with an atomic copy."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not PathManager.supports_rename(dst_path):
            return PathManager.copy(src_path, dst_path, overwrite=overwrite)
        refuse_special_target(dst_path)
        try_again(
            lambda: replace_atomically(_place(dst_path), lambda unfinished: shutil.copyfile(src_path, unfinished)), dst_path
        )
        return True


def verify_save_dir(save_dir: str) -> None:
    """Replaces fairseq's verify_checkpoint_directory. Raises ConfigurationError if checkpoints cannot be written."""
    try:
        os.makedirs(save_dir, exist_ok=True)
        with unfinished_beside(os.path.join(save_dir, "checkpoint_writable.pt")):  # a name that remove_unfinished knows
            pass
    except OSError as error:
        raise _unusable(save_dir, error) from None


def _unusable(save_dir: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"--save-dir {save_dir} cannot be written ({error.strerror or error}); give a writable folder with free space"
    )


def _save_or_say_why_not(save_checkpoint: Callable) -> Callable:
    """fairseq's save_checkpoint, which also creates the folder and removes old files, with one-sentence disk errors."""

    @functools.wraps(save_checkpoint)
    def save(cfg: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return save_checkpoint(cfg, *arguments, **options)
        except OSError as error:
            raise _unusable(cfg.save_dir, error) from None

    return save


def install() -> None:
    """Make fairseq write checkpoints this way."""
    checkpoint_utils.torch_persistent_save = _persist
    checkpoint_utils.PathManager = _AtomicPathManager
    checkpoint_utils.verify_checkpoint_directory = verify_save_dir
    if not hasattr(checkpoint_utils.save_checkpoint, "__wrapped__"):
        checkpoint_utils.save_checkpoint = _save_or_say_why_not(checkpoint_utils.save_checkpoint)
