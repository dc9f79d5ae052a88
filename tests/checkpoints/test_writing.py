"""Writing: killed at any moment, a checkpoint is the old one or the new one, and whole."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Callable
from unittest.mock import DEFAULT, patch

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig

import fairseq_sparsemixer  # noqa: F401  fairseq writes by it from here on
from fairseq_sparsemixer.checkpoints import read_checkpoint, save_atomically
from fairseq_sparsemixer.checkpoints.writing import remove_unfinished

NUMBERS = 100_000


def state(update: int):
    return {"model": {"weight": torch.full((NUMBERS,), float(update))}, "update": update}


def save_as_fairseq_does(folder: Path, update: int) -> None:
    """checkpoint_utils.save_checkpoint in the middle of an epoch: checkpoint_1_N.pt, and a copy of it, checkpoint_last.pt."""
    trainer = SimpleNamespace(
        data_parallel_rank=0,
        should_save_checkpoint_on_current_rank=True,
        checkpoint_suffix="",
        task=None,
        consolidate_optimizer=lambda: None,
        get_num_updates=lambda: update,
        save_checkpoint=lambda path, extra: checkpoint_utils.torch_persistent_save(state(update), path),
    )
    iterator = SimpleNamespace(epoch=1, end_of_epoch=lambda: False, state_dict=dict)
    cfg = CheckpointConfig(save_dir=str(folder), save_interval_updates=1, keep_interval_updates=2)
    checkpoint_utils.save_checkpoint(cfg, trainer, iterator, None)


def in_child(action: Callable[[], None]) -> int:
    """The pid of a forked process that does `action`."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_saved(obj, path) -> None:
    Path(path).write_bytes(b"PK" + bytes(1000))
    die()


def half_copied(source, target) -> None:
    Path(target).write_bytes(Path(source).read_bytes()[:1000])
    die()


def on_call(number: int, function: Callable, then: Callable) -> Callable:
    """`function`, and at its n-th call `then` in its place."""
    calls = iter(range(1, 1000))
    return lambda *args: (then if next(calls) == number else function)(*args)


def replaced_then_die(source, target) -> None:
    os.rename(source, target)
    die()


MOMENTS = {
    "half of the file is written": ("torch.save", half_saved, 1),
    "the file is not on the disk": ("os.fsync", die, 1),
    "the file has no name": ("os.replace", die, 1),
    "the file just got its name": ("os.replace", replaced_then_die, 1),
    "half of the copy is written": ("shutil.copyfile", half_copied, 1),
    "the copy has no name": ("os.replace", die, 2),
    "the copy just got its name": ("os.replace", replaced_then_die, 2),
    "the old ones are being removed": ("os.remove", die, 1),
}
FUNCTIONS = {
    "torch.save": torch.save,
    "os.fsync": os.fsync,
    "os.replace": os.replace,
    "shutil.copyfile": shutil.copyfile,
    "os.remove": os.remove,
}


def assert_all_whole(folder: Path, last: int) -> None:
    """Every checkpoint in the folder can be read, and checkpoint_last.pt is of update `last` or the one before it."""
    for path in folder.glob("checkpoint*.pt"):
        found = read_checkpoint(str(path))
        assert torch.equal(found["model"]["weight"], torch.full((NUMBERS,), float(found["update"])))
    assert read_checkpoint(str(folder / "checkpoint_last.pt"))["update"] in (last - 1, last)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_whole_checkpoints(tmp_path, moment):
    for update in (1, 2):
        save_as_fairseq_does(tmp_path, update)
    name, then, number = MOMENTS[moment]

    def save() -> None:
        with patch(name, on_call(number, FUNCTIONS[name], then)):
            save_as_fairseq_does(tmp_path, 3)

    _, status = os.waitpid(in_child(save), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert_all_whole(tmp_path, last=3)

    remove_unfinished(str(tmp_path))
    assert all(path.name.endswith(".pt") for path in tmp_path.iterdir())
    save_as_fairseq_does(tmp_path, 3)
    assert read_checkpoint(str(tmp_path / "checkpoint_last.pt"))["update"] == 3


def test_kills_at_random_moments_leave_whole_checkpoints(tmp_path):
    save_as_fairseq_does(tmp_path, 0)

    def save_for_ever() -> None:
        for update in range(1, 1_000_000):
            save_as_fairseq_does(tmp_path, update)

    draw = random.Random(1)
    for _ in range(12):
        pid = in_child(save_for_ever)
        time.sleep(draw.uniform(0.01, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        newest = read_checkpoint(str(tmp_path / "checkpoint_last.pt"))["update"]
        assert_all_whole(tmp_path, last=newest)


def test_a_failing_disk_is_tried_again_and_then_reported(tmp_path):
    path = str(tmp_path / "checkpoint_last.pt")
    save_atomically(state(1), path)
    full = OSError(28, "No space left on device")
    with patch("time.sleep"), patch("torch.save", side_effect=full) as save, pytest.raises(OSError, match="No space left"):
        save_atomically(state(2), path)
    assert save.call_count == 3
    assert read_checkpoint(path)["update"] == 1
    with patch("time.sleep"), patch("torch.save", side_effect=[full, full, DEFAULT], wraps=torch.save):
        save_atomically(state(2), path)
    assert read_checkpoint(path)["update"] == 2


def test_a_copy_is_a_file_of_its_own(tmp_path):
    save_as_fairseq_does(tmp_path, 1)
    torch.save({"model": {}}, tmp_path / "checkpoint_1_1.pt")  # in place, as a careless script does it
    assert read_checkpoint(str(tmp_path / "checkpoint_last.pt"))["update"] == 1
