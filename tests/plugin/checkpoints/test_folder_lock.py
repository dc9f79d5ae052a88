"""Two training runs in one folder: the second ends with an error that names the first, and the first loses nothing."""

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
    """Whether a new process cannot lock the folder."""

    def attempt() -> None:
        try:
            lock_folder(str(folder))
        except ConfigurationError:
            return
        os._exit(1)

    return os.waitstatus_to_exitcode(os.waitpid(in_child(attempt), 0)[1]) == 0


def test_a_folder_is_locked_by_one_process_until_it_ends(tmp_path):
    with another_process(lambda: lock_folder(str(tmp_path))) as pid:
        holder = f"in use by process {pid} on {socket.gethostname()}, which is training; wait until that ends, or give another"
        with pytest.raises(ConfigurationError, match=holder):
            lock_folder(str(tmp_path))
    lock_folder(str(tmp_path))
    lock_folder(f"{tmp_path}/.")  # consecutive runs in this process
    assert is_refused(tmp_path)
    release_folders()
    assert not is_refused(tmp_path) and not list(tmp_path.glob("*.pt"))


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    pids = []

    def lock_and_fork() -> None:
        lock_folder(str(tmp_path))
        worker = os.fork()  # like fairseq's data-loading workers
        if worker == 0:
            signal.alarm(60)
            signal.pause()
        (tmp_path / "worker").write_text(str(worker))

    with another_process(lock_and_fork):
        pids.append(int((tmp_path / "worker").read_text()))
        assert is_refused(tmp_path)
    assert not is_refused(tmp_path)
    os.kill(pids[0], signal.SIGKILL)


def test_a_file_system_without_locks_gives_a_warning(tmp_path, caplog):
    with patch.object(folder_lock.fcntl, "lockf", side_effect=OSError(37, "No locks available")):
        lock_folder(str(tmp_path))
    assert "is not locked against a second training run (its file system has no locks)" in caplog.text
    assert not is_refused(tmp_path)


def test_a_full_disk_does_not_prevent_locking(tmp_path):
    with patch("os.write", side_effect=OSError(28, "No space left on device")):
        lock_folder(str(tmp_path))
    assert is_refused(tmp_path)
    release_folders()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_second_training_run_is_refused_and_changes_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    runs.train(corpus, run, updates=1)
    assert not (run / NAME).exists() and not is_refused(run)  # released when training ends
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != NAME}
    with another_process(lambda: lock_folder(str(run))) as pid:
        with pytest.raises(SystemExit, match=f"--save-dir .*run is in use by process {pid} on"):
            runs.train(corpus, run, updates=2)
        runs.train(corpus, run, "--no-save", updates=2)  # writes nothing
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != NAME} == before
    assert len(runs.train(corpus, run, updates=2)) == 1


def test_a_command_does_not_overwrite_checkpoints_of_a_running_training(tmp_path):
    with another_process(lambda: lock_folder(str(tmp_path))) as pid:
        for name in ("checkpoint_last.pt", "checkpoint_1_20-rank-0.pt", "checkpoint.best_loss_3.1200.pt", "checkpoint3.pt"):
            sentence = f"{name} may be overwritten by process {pid} on .*, which is training; wait until that ends, or give"
            with pytest.raises(ConfigurationError, match=sentence), writing_checkpoints([str(tmp_path / name)]):
                pass
        with writing_checkpoints([str(tmp_path / "whole.pt"), str(tmp_path / "checkpoint_portable.pt")]):
            pass  # names that training does not use


def test_training_does_not_start_while_a_command_writes_a_checkpoint(tmp_path):
    with writing_checkpoints([str(tmp_path / f"checkpoint_last-rank-{rank}.pt") for rank in range(2)]):
        assert is_refused(tmp_path)
    assert not (tmp_path / NAME).exists() and not is_refused(tmp_path)
    lock_folder(str(tmp_path))
    with writing_checkpoints([str(tmp_path / "checkpoint_last.pt")]):  # by the process that is training
        pass
    assert is_refused(tmp_path)
    release_folders()
