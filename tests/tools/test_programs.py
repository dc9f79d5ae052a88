"""Child programs: they end with their parent, however it ends, and use threads considerately."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools import machine, programs
from fairseq_sparsemixer.tools.programs import ProgramFailed, child_environment, die_with_parent, follow, run, stop

# starts a child in a thread, as the recipes do, and prints its process id
PARENT = """
import subprocess, sys, threading
from fairseq_sparsemixer.tools.programs import die_with_parent

def work():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], preexec_fn=die_with_parent())
    print(child.pid, flush=True)
    child.wait()

thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
# `python -m recipes.NAME` with another program instead of fairseq-train; signals arrive while Python is still forking
RECIPE = """
import os, sys, time
from pathlib import Path
from rich.console import Console
from recipes.common.progress import run_program
from recipes.common.session import run_as_program

os.register_at_fork(after_in_parent=lambda: time.sleep(0.2))
child = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
run_as_program(lambda: run_program([sys.executable, "-c", child], Path(sys.argv[1]), Console()))
"""


def is_gone(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone ends children with their parent")


@linux
def test_a_child_ends_if_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert not is_gone(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: is_gone(child))


@pytest.mark.slow
@linux
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_recipe_does_not_leave_its_training_behind(tmp_path, number, status):
    log = tmp_path / "console.log"
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}  # background jobs ignore SIGINT
    recipe = subprocess.Popen(
        [sys.executable, "-c", RECIPE, str(log)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **ignoring
    )

    def children():
        with open(f"/proc/{recipe.pid}/task/{recipe.pid}/children") as file:
            return [int(word) for word in file.read().split()]

    wait_until(lambda: recipe.poll() is not None or children())
    (child,) = children()
    recipe.send_signal(number)
    assert recipe.wait(60) == status
    wait_until(lambda: is_gone(child))
    assert ("interrupted; rerun the same command" in recipe.stderr.read()) == (status == 130)


def test_a_program_starts_without_blocked_signals(tmp_path):
    run([sys.executable, "-c", "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "set()\n"


def test_a_full_disk_also_ends_the_program(tmp_path):
    from rich.console import Console

    from recipes.common.progress import run_program

    command = [sys.executable, "-c", "import time\nwhile True: print('x' * 9999, flush=True); time.sleep(0.01)"]
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        run_program(command, tmp_path / "log", Console(quiet=True))


def test_a_failed_programs_reason_comes_from_its_own_part_of_the_log(tmp_path):
    log = tmp_path / "log"
    log.write_text("ValueError: of the attempt before\n")
    with pytest.raises(ProgramFailed, match="^it printed nothing$"):
        run([sys.executable, "-c", "raise SystemExit(3)"], log)
    with pytest.raises(ProgramFailed, match="ValueError: new") as failure:
        run([sys.executable, "-c", "raise ValueError('new')"], log)
    assert failure.value.status == 1 and log.read_text().startswith("ValueError: of the attempt before\nTraceback")


def test_the_watch_function_can_end_a_program(tmp_path):
    def watch():
        raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([sys.executable, "-c", "import time; time.sleep(1000)"], tmp_path / "log", watch=watch, interval=0.01)
    assert time.monotonic() - begun < 60


def test_a_missing_program_gives_a_one_line_error(tmp_path):
    with pytest.raises(ConfigurationError, match="no-such-program cannot be started .No such file"):
        follow(["no-such-program"], tmp_path / "log", print)


def test_children_can_be_started_in_several_threads():
    def work():
        for _ in range(5):
            assert subprocess.Popen([sys.executable, "-S", "-c", ""], preexec_fn=die_with_parent()).wait() == 0

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_program_that_ignores_a_signal_is_killed():
    code = (
        "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; print('ready', flush=True); time.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    stop([process], patience=0.1, first=signal.SIGINT)
    assert process.returncode == -signal.SIGKILL


def test_threads_wait_passively_unless_the_user_sets_otherwise(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(programs, "usable_cores", lambda: 4)
    monkeypatch.setattr(programs, "visible_cores", lambda: 4)
    assert child_environment()["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_NUM_THREADS" not in child_environment()
    assert child_environment(threads=3)["OMP_NUM_THREADS"] == "3"
    monkeypatch.setattr(programs, "visible_cores", lambda: 64)  # a machine of which the container gets a part
    assert child_environment()["OMP_NUM_THREADS"] == "4"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(threads=3)["OMP_WAIT_POLICY"] == "ACTIVE" and child_environment(threads=3)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("files, cores", [
    ({"cpu.max": "200000 100000\n"}, 2),
    ({"cpu.max": "50000 100000\n"}, 1),
    ({"cpu.max": "max 100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu.max": "9900000 100000\n"}, 8),
    ({}, 8),
])  # fmt: skip
def test_a_containers_quota_limits_the_cores(files, cores, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "visible_cores", lambda: 8)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.usable_cores(tmp_path) == cores
