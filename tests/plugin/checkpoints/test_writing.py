"""Writing checkpoints: after a kill at any moment, a checkpoint is the complete old or new file."""

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
from forks import in_child

import fairseq_sparsemixer  # noqa: F401  from here on, fairseq writes with it
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import finish, unfinished_beside
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint, save_atomically, writing
from fairseq_sparsemixer.plugin.checkpoints.writing import remove_unfinished

NUMBERS = 100_000


def state(update: int):
    return {"model": {"weight": torch.full((NUMBERS,), float(update))}, "update": update}


def save_as_fairseq_does(folder: Path, update: int) -> None:
    """Call checkpoint_utils.save_checkpoint in mid-epoch: it writes checkpoint_1_N.pt and its copy checkpoint_last.pt."""
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


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_saved(obj, path) -> None:
    Path(path).write_bytes(b"PK" + bytes(1000))
    die()


def half_copied(source, target) -> None:
    Path(target).write_bytes(Path(source).read_bytes()[:1000])
    die()


def on_call(number: int, function: Callable, then: Callable) -> Callable:
    """`function`, replaced by `then` at its n-th call."""
    calls = iter(range(1, 1000))
    return lambda *args: (then if next(calls) == number else function)(*args)


def replaced_then_die(source, target) -> None:
    os.rename(source, target)
    die()


MOMENTS = {
    "half of the file is written": ("torch.save", half_saved, 1),
    "the file is not yet on disk": ("os.fsync", die, 1),
    "the file is not yet renamed": ("os.replace", die, 1),
    "the file was just renamed": ("os.replace", replaced_then_die, 1),
    "half of the copy is written": ("shutil.copyfile", half_copied, 1),
    "the copy is not yet renamed": ("os.replace", die, 2),
    "the copy was just renamed": ("os.replace", replaced_then_die, 2),
    "old checkpoints are being removed": ("os.remove", die, 1),
}
FUNCTIONS = {
    "torch.save": torch.save,
    "os.fsync": os.fsync,
    "os.replace": os.replace,
    "shutil.copyfile": shutil.copyfile,
    "os.remove": os.remove,
}


def assert_all_whole(folder: Path, last: int) -> None:
    """Check that every checkpoint can be read, and checkpoint_last.pt is from update `last` or the one before."""
    for path in folder.glob("checkpoint*.pt"):
        found = read_checkpoint(str(path))
        assert torch.equal(found["model"]["weight"], torch.full((NUMBERS,), float(found["update"])))
    assert read_checkpoint(str(folder / "checkpoint_last.pt"))["update"] in (last - 1, last)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_leaves_complete_checkpoints(tmp_path, moment):
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


def test_kills_at_random_moments_leave_complete_checkpoints(tmp_path):
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


def test_a_failing_disk_is_retried_and_then_reported(tmp_path):
    path = str(tmp_path / "checkpoint_last.pt")
    save_atomically(state(1), path)
    full = OSError(28, "No space left on device")
    sentence = "checkpoint_last.pt cannot be written .No space left on device; .* MiB are free there.; give another path"
    with patch("time.sleep"), patch("torch.save", side_effect=full) as save, pytest.raises(ConfigurationError, match=sentence):
        save_atomically(state(2), path)
    assert save.call_count == 3
    assert read_checkpoint(path)["update"] == 1
    with patch("time.sleep"), patch("torch.save", side_effect=[full, full, DEFAULT], wraps=torch.save):
        save_atomically(state(2), path)
    assert read_checkpoint(path)["update"] == 2


def test_a_copy_is_a_separate_file(tmp_path):
    save_as_fairseq_does(tmp_path, 1)
    torch.save({"model": {}}, tmp_path / "checkpoint_1_1.pt")  # in place, as a careless script would
    assert read_checkpoint(str(tmp_path / "checkpoint_last.pt"))["update"] == 1


def test_concurrent_writers_never_touch_each_others_unfinished_file(tmp_path):
    path = str(tmp_path / "checkpoint_last.pt")
    with unfinished_beside(path) as one, unfinished_beside(path) as other:
        assert one != other
        torch.save(state(1), one)
        torch.save(state(2), other)
        finish(one, path)
        assert read_checkpoint(path)["update"] == 1
        finish(other, path)
    assert read_checkpoint(path)["update"] == 2 and [file.name for file in tmp_path.iterdir()] == ["checkpoint_last.pt"]


def test_writers_in_separate_processes_leave_a_complete_file(tmp_path):
    path = str(tmp_path / "checkpoint_last.pt")

    def save_often(update: int) -> None:
        for _ in range(20):
            save_atomically(state(update), path)

    pids = [in_child(lambda update=update: save_often(update)) for update in range(3)]
    for pid in pids:
        os.waitpid(pid, 0)
    found = read_checkpoint(path)
    assert torch.equal(found["model"]["weight"], torch.full((NUMBERS,), float(found["update"])))
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_last.pt"]


def test_unfinished_files_are_removed_only_if_their_process_is_dead(tmp_path):
    path = str(tmp_path / "checkpoint_last.pt")
    ready, go = os.pipe()

    def half() -> None:
        with unfinished_beside(path) as unfinished:
            Path(unfinished).write_bytes(b"PK")
            os.write(go, b"x")
            time.sleep(600)

    pid = in_child(half)
    os.read(ready, 1)
    (tmp_path / "checkpoint_last.pt.tmp").write_bytes(b"from an earlier version")
    (tmp_path / "checkpoint_last-rank-1.pt.staged").write_bytes(b"waits")
    (tmp_path / "checkpoint_notes.pt.mine.tmp").write_text("the user's")
    remove_unfinished(str(tmp_path))
    left = sorted(file.name for file in tmp_path.iterdir())
    assert left[0] == "checkpoint_last-rank-1.pt.staged" and left[1].startswith(f"checkpoint_last.pt.{pid}-") and len(left) == 3
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    remove_unfinished(str(tmp_path), staged=True)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint_notes.pt.mine.tmp"]


def test_links_devices_pipes_and_folders_are_not_replaced(tmp_path):
    kept, link, pipe = tmp_path / "elsewhere" / "kept.pt", tmp_path / "link.pt", tmp_path / "pipe.pt"
    kept.parent.mkdir()
    link.symlink_to(kept)
    os.mkfifo(pipe)
    for save in (save_atomically, checkpoint_utils.torch_persistent_save):
        save(state(1), str(link))
        assert link.is_symlink() and read_checkpoint(str(kept))["update"] == 1
        kept.unlink()
        for path, sentence in (
            (str(pipe), "pipe.pt is a pipe or device, not a file; give the name of a file"),
            ("/dev/null", "/dev/null is a pipe or device"),
            (str(tmp_path), "is a folder, not a file"),
            ("", "the name of the checkpoint to write is empty"),
        ):
            with pytest.raises(ConfigurationError, match=sentence):
                save(state(1), path)
    assert Path("/dev/null").is_char_device() and pipe.is_fifo()


def test_a_link_to_another_checkpoint_of_the_run_is_not_followed(tmp_path):
    first, link = tmp_path / "checkpoint_1_1.pt", tmp_path / "checkpoint_best.pt"
    torch.save(state(1), first)
    link.symlink_to(first)
    checkpoint_utils.torch_persistent_save(state(2), str(link))
    checkpoint_utils.PathManager.copy(str(link), str(tmp_path / "checkpoint_last.pt"), overwrite=True)
    updates = {path.name: read_checkpoint(str(path))["update"] for path in tmp_path.iterdir()}
    assert updates == {"checkpoint_1_1.pt": 1, "checkpoint_best.pt": 2, "checkpoint_last.pt": 2}


def test_an_unusable_save_dir_gives_a_one_line_error_before_training(tmp_path):
    (tmp_path / "file").write_text("the user's")
    for folder, reason in (
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "in", "Not a directory"),
        ("/proc/x", "No such"),
    ):
        with pytest.raises(ConfigurationError, match=f"--save-dir {folder} cannot be written .{reason}") as error:
            checkpoint_utils.verify_checkpoint_directory(str(folder))
        assert "\n" not in str(error.value)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "dummy").write_text("the user's")  # the name that fairseq uses for its test file
    checkpoint_utils.verify_checkpoint_directory(str(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["dummy"]
    assert (tmp_path / "run" / "dummy").read_text() == (tmp_path / "file").read_text() == "the user's"


def test_a_test_file_left_by_a_kill_is_also_removed(tmp_path):
    with patch("os.remove", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
    remove_unfinished(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_removed_save_dir_is_recreated_and_a_file_in_its_place_is_an_error(tmp_path):
    folder = tmp_path / "run"
    save_as_fairseq_does(folder, 1)
    shutil.rmtree(folder)
    save_as_fairseq_does(folder, 2)  # the folder is recreated
    assert read_checkpoint(str(folder / "checkpoint_last.pt"))["update"] == 2
    shutil.rmtree(folder)
    folder.write_text("in the way")
    with pytest.raises(ConfigurationError, match="run cannot be written .File exists"):
        save_as_fairseq_does(folder, 3)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_read_only_save_dir_gives_a_one_line_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigurationError, match="cannot be written .Permission denied"):
        checkpoint_utils.verify_checkpoint_directory(str(tmp_path))


def test_remote_paths_are_left_to_fairseq_and_iopath(monkeypatch):
    handed = []
    monkeypatch.setattr(writing.PathManager, "supports_rename", staticmethod(lambda path: "://" not in path))
    monkeypatch.setattr(writing, "persist_remotely", lambda *arguments: handed.append(arguments))
    monkeypatch.setattr(writing.PathManager, "copy", staticmethod(lambda *arguments, **named: handed.append((arguments, named))))
    checkpoint_utils.torch_persistent_save({"a": 1}, "store://bucket/checkpoint.pt")
    checkpoint_utils.PathManager.copy("store://bucket/a.pt", "store://bucket/b.pt", overwrite=True)
    assert handed == [
        ({"a": 1}, "store://bucket/checkpoint.pt", False),
        (("store://bucket/a.pt", "store://bucket/b.pt"), {"overwrite": True}),
    ]
