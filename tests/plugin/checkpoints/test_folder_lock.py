"""Two trainings into one folder: the second ends with a sentence that names the first, and the first loses nothing."""

import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator
from unittest.mock import patch

import pytest
import runs
from forks import in_child

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import folder_lock
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import NAME, lock_folder, release_folders, writing_checkpoints


@contextmanager
def another_process(action: Callable[[], None]) -> Iterator[int]:
    """The pid of a forked process that has done `action`, and is killed afterwards."""
    done, tell = os.pipe()

    def hold() -> None:
        action()
        os.write(tell, b"y")
        signal.pause()

    pid = in_child(hold)
    os.close(tell)
    assert os.read(done, 1) == b"y"
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(done)


def is_refused(folder: Path) -> bool:
    """Whether a process of its own cannot take the folder."""

    def attempt() -> None:
        try:
            lock_folder(str(folder))
        except ConfigurationError:
            return
        os._exit(1)

    return os.waitstatus_to_exitcode(os.waitpid(in_child(attempt), 0)[1]) == 0


def test_a_folder_is_one_process_s_until_it_is_killed(tmp_path):
    with another_process(lambda: lock_folder(str(tmp_path))) as pid:
        holder = f"in use by process {pid} on {socket.gethostname()}, which is training; wait until that ends, or give another"
        with pytest.raises(ConfigurationError, match=holder):
            lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))
    lock_folder(f"{tmp_path}/.")  # one run after the other in this process
    assert is_refused(tmp_path)
    release_folders()
    assert not is_refused(tmp_path) and not list(tmp_path.glob("*.pt"))


def test_a_process_that_the_holder_forked_and_left_behind_does_not_keep_the_folder(tmp_path):
    pids = []

    def lock_and_fork() -> None:
        lock_folder(str(tmp_path))
        worker = os.fork()  # as fairseq's workers that load data are
        if worker == 0:
            signal.alarm(60)
            signal.pause()
        (tmp_path / "worker").write_text(str(worker))

    with another_process(lock_and_fork):
        pids.append(int((tmp_path / "worker").read_text()))
        assert is_refused(tmp_path)
    assert not is_refused(tmp_path)
    os.kill(pids[0], signal.SIGKILL)


def test_without_locks_there_is_a_warning(tmp_path, caplog):
    with patch.object(folder_lock.fcntl, "lockf", side_effect=OSError(37, "No locks available")):
        lock_folder(str(tmp_path))
    assert "is not locked against a second training run (its file system has no locks)" in caplog.text
    assert not is_refused(tmp_path)


def test_a_full_disk_has_no_room_for_the_note_and_the_folder_is_taken_all_the_same(tmp_path):
    with patch("os.write", side_effect=OSError(28, "No space left on device")):
        lock_folder(str(tmp_path))
    assert is_refused(tmp_path)
    release_folders()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_training_ends_with_the_sentence_and_touches_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    runs.train(corpus, run, updates=1)
    assert not (run / NAME).exists() and not is_refused(run)  # released with the end of the training
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != NAME}
    with another_process(lambda: lock_folder(str(run))) as pid:
        with pytest.raises(SystemExit, match=f"--save-dir .*run is in use by process {pid} on"):
            runs.train(corpus, run, updates=2)
        runs.train(corpus, run, "--no-save", updates=2)  # writes nothing
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != NAME} == before
    assert len(runs.train(corpus, run, updates=2)) == 1


def test_a_command_writes_no_checkpoint_of_a_training_that_is_under_way(tmp_path):
    with another_process(lambda: lock_folder(str(tmp_path))) as pid:
        for name in ("checkpoint_last.pt", "checkpoint_1_20-rank-0.pt", "checkpoint.best_loss_3.1200.pt", "checkpoint3.pt"):
            sentence = f"{name} may be overwritten by process {pid} on .*, which is training; wait until that ends, or give"
            with pytest.raises(ConfigurationError, match=sentence), writing_checkpoints([str(tmp_path / name)]):
                pass
        with writing_checkpoints([str(tmp_path / "whole.pt"), str(tmp_path / "checkpoint_portable.pt")]):
            pass  # names that no training uses


def test_no_training_starts_where_a_command_writes_a_checkpoint(tmp_path):
    with writing_checkpoints([str(tmp_path / f"checkpoint_last-rank-{rank}.pt") for rank in range(2)]):
        assert is_refused(tmp_path)
    assert not (tmp_path / NAME).exists() and not is_refused(tmp_path)
    lock_folder(str(tmp_path))
    with writing_checkpoints([str(tmp_path / "checkpoint_last.pt")]):  # by the training's own process
        pass
    assert is_refused(tmp_path)
    release_folders()
