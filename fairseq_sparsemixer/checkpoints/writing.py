"""Writing a checkpoint: whoever reads the file, and whenever the writer is killed, it is whole, the old one or the new one."""

import errno
import functools
import logging
import os
import re
import shutil
import time
from glob import escape, glob
from typing import Any, Callable

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import UNFINISHED, finish, is_abandoned, is_special, overwritten, unfinished_beside

logger = logging.getLogger(__name__)

STAGED = ".staged"  # ends the name of a file that waits for the files of other ranks: see shards
ATTEMPTS, PAUSE = 3, 2.5  # as fairseq: a network file system may fail for a moment
LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)  # no moment

LEFT_BEHIND = re.compile(rf"checkpoint.*\.pt(?:{re.escape(STAGED)})?(?:\.\d+-[0-9a-f]+)?{re.escape(UNFINISHED)}")

persist_remotely = checkpoint_utils.torch_persistent_save  # fairseq's own, kept for the paths that only iopath knows


def replace_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Have `write` make a file beside `path`, and give it that name once its bytes are on the disk. Raises OSError."""
    with unfinished_beside(path) as unfinished:
        write(unfinished)
        finish(unfinished, path)


def save_atomically(obj: Any, path: str) -> None:
    """torch.save that leaves the previous file until the new one is whole; a link is followed.

    Tries again when the disk fails for a moment. Raises ConfigurationError where it cannot be written.
    """
    refuse_special_target(path)
    target = os.path.realpath(path)
    try_again(lambda: replace_atomically(target, lambda unfinished: torch.save(obj, unfinished)), path)


def try_again(write: Callable[[], Any], path: str) -> None:
    """Write, and again where the disk fails for a moment. Raises ConfigurationError that names `path`."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return write()
        except (OSError, RuntimeError) as error:
            if attempt == ATTEMPTS or getattr(error, "errno", None) in LASTING:
                raise cannot_write(path, error) from None
            logger.warning("writing %s failed (%s); trying again", path, error)
            time.sleep(PAUSE)


class Unwritable(ConfigurationError):
    """Nothing is wrong with what was to be written: the disk does not take it."""


def cannot_write(path: str, error: Exception) -> Unwritable:
    """What to tell the user of what the system, or torch's writer, said."""
    reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.isdir(folder) and getattr(error, "errno", None) not in LASTING:
        reason += f"; {shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free there"
    return Unwritable(f"{path} cannot be written ({reason}); give another place, or make this one writable")


def refuse_special_target(path: str) -> None:
    """Raise ConfigurationError where a file of that name would take the place of something else than a file."""
    if not path:
        raise ConfigurationError("the name of the checkpoint to write is empty; give a path")
    if os.path.isdir(path) or is_special(path):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise ConfigurationError(f"{path} is {kind}, no place for a checkpoint; give the name of a file")


def require_targets(written: Any, read: Any) -> None:
    """Raise ConfigurationError, before any work is done, where files cannot be written, or are those that are read."""
    lost = overwritten(read, written)
    if lost is not None:
        raise ConfigurationError(f"{lost} would be overwritten, and it is what is read; choose another OUT")
    if len({os.path.realpath(path) for path in written}) < len(written):
        raise ConfigurationError(f"{written[-1]} is to be written twice; give each file a name of its own")
    for path in written:
        refuse_special_target(path)
        folder = os.path.dirname(os.path.realpath(path))
        if not os.path.isdir(folder):
            raise ConfigurationError(f"{path} cannot be written, as the folder {folder} does not exist; make it first")
        try:
            with unfinished_beside(os.path.realpath(path)):
                pass
        except OSError as error:
            raise cannot_write(path, error) from None


def remove_unfinished(folder: str, staged: bool = False) -> None:
    """Remove what killed runs were writing in a folder of checkpoints; staged: also what waited for other ranks.

    Files that a process is writing now stay.
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
        pass  # another run was faster


def _place(path: str) -> str:
    """Where a run's file of that name goes: where a link leads, but a link to another checkpoint of its folder is replaced."""
    place = os.path.realpath(path)
    return path if os.path.dirname(place) == os.path.realpath(os.path.dirname(path) or ".") else place


def _persist(obj: Any, filename: str, async_write: bool = False) -> None:
    """fairseq's torch_persistent_save."""
    if async_write or not PathManager.supports_rename(filename):
        persist_remotely(obj, filename, async_write)
        return
    refuse_special_target(filename)
    try_again(lambda: replace_atomically(_place(filename), lambda unfinished: torch.save(obj, unfinished)), filename)


class _AtomicPathManager(PathManager):
    """fairseq's PathManager, whose copy of a file is never seen half made."""

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
    """fairseq's verify_checkpoint_directory. Raises ConfigurationError where checkpoints cannot be written."""
    try:
        os.makedirs(save_dir, exist_ok=True)
        with unfinished_beside(os.path.join(save_dir, "checkpoint_writable.pt")):  # a name that remove_unfinished knows
            pass
    except OSError as error:
        raise _unusable(save_dir, error) from None


def _unusable(save_dir: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"--save-dir {save_dir} cannot take checkpoints ({error.strerror or error}); give a folder with room that can be written"
    )


def _save_or_say_why_not(save_checkpoint: Callable) -> Callable:
    """fairseq's save_checkpoint, which also makes the folder and removes old files, with one sentence for the disk's errors."""

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
