"""A small in-memory file system that can be filled, emptied and made read-only."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import pytest

FILLER = "filler"


@contextmanager
def small_disk(place: Path, mebibytes: int) -> Iterator[Path]:
    """Mount a new file system of this size at `place`; skips the test if this process cannot mount."""
    place.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def leave_free(disk: Path, size: int) -> None:
    """Fill the disk up to about `size` free bytes."""
    filler = disk / FILLER
    filler.unlink(missing_ok=True)
    about = os.statvfs(disk)
    taken = about.f_bavail * about.f_frsize - size
    if taken > 0:
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, taken)


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Make the disk read-only while the context is open."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
