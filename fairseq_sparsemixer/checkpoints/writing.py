"""Writing a checkpoint: whoever reads the file, and whenever the writer is killed, it is whole, the old one or the new one."""

import logging
import os
import shutil
import time
from glob import escape, glob
from typing import Any, Callable

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

logger = logging.getLogger(__name__)

UNFINISHED = ".tmp"  # follows the name of a file that is being written
STAGED = ".staged"  # and of one that waits for the files of other ranks: see shards
ATTEMPTS, PAUSE = 3, 2.5  # as fairseq: a network file system may fail for a moment

persist_remotely = checkpoint_utils.torch_persistent_save  # fairseq's own, kept for the paths that only iopath knows


def replace_atomically(path: str, write: Callable[[str], Any]) -> None:
    """Have `write` make a file beside `path`, and give it that name once its bytes are on the disk."""
    unfinished = path + UNFINISHED
    try:
        write(unfinished)
    except Exception:
        if os.path.exists(unfinished):
            os.remove(unfinished)
        raise
    _flush_to_disk(unfinished)
    os.replace(unfinished, path)
    _flush_to_disk(os.path.dirname(os.path.abspath(path)))  # the name as well


def save_atomically(obj: Any, path: str) -> None:
    """torch.save that leaves the previous file until the new one is whole; tries again when the disk fails for a moment."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return replace_atomically(path, lambda unfinished: torch.save(obj, unfinished))
        except (OSError, RuntimeError) as error:
            if attempt == ATTEMPTS:
                raise
            logger.warning("writing %s failed (%s); trying again", path, error)
            time.sleep(PAUSE)


def remove_unfinished(folder: str) -> None:
    """Remove what a killed run was writing in a folder of checkpoints."""
    for ending in (UNFINISHED, STAGED, STAGED + UNFINISHED):
        for path in glob(os.path.join(escape(folder), f"checkpoint*.pt{ending}")):
            os.remove(path)


def _flush_to_disk(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _persist(obj: Any, filename: str, async_write: bool = False) -> None:
    """fairseq's torch_persistent_save."""
    if async_write or not PathManager.supports_rename(filename):
        persist_remotely(obj, filename, async_write)
    else:
        save_atomically(obj, filename)


class _AtomicPathManager(PathManager):
    """fairseq's PathManager, whose copy of a file is never seen half made."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        if not PathManager.supports_rename(dst_path):
            return PathManager.copy(src_path, dst_path, overwrite=overwrite)
        replace_atomically(dst_path, lambda unfinished: shutil.copyfile(src_path, unfinished))
        return True


def install() -> None:
    """Make fairseq write checkpoints this way."""
    checkpoint_utils.torch_persistent_save = _persist
    checkpoint_utils.PathManager = _AtomicPathManager
