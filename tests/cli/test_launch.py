"""`fairseq-sparsemixer launch`: the flags of each rank, and what happens if a rank fails."""

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import List
from unittest.mock import patch

import pytest
from ranks import start_ranks

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.cli.launch import rank_command


def test_each_rank_gets_its_fairseq_flags():
    assert rank_command(["fairseq-train", "data", "--fp16"], rank=1, world_size=2, meeting="file:///tmp/m/ranks") == (
        "fairseq-train data --fp16 --cpu --distributed-world-size 2 --distributed-rank 1 --distributed-init-method"
        " file:///tmp/m/ranks --distributed-backend gloo --distributed-no-spawn --device-id 0 --ddp-backend legacy_ddp"
    ).split(" ")


def test_hydra_programs_get_overrides():
    command = rank_command(["/bin/fairseq-hydra-train", "task.data=x"], rank=0, world_size=4, meeting="file:///tmp/m/ranks")
    assert command[2:4] == ["common.cpu=True", "distributed_training.distributed_world_size=4"]
    assert "distributed_training.ddp_backend=legacy_ddp" in command


def test_flags_set_by_the_user_are_kept():
    command = rank_command(
        ["fairseq-train", "--cpu", "--ddp-backend", "no_c10d"], rank=0, world_size=2, meeting="file:///tmp/m/ranks"
    )
    assert command.count("--cpu") == 1 and command.count("--ddp-backend") == 1


def test_one_rank_needs_no_process_group():
    assert rank_command(["fairseq-train"], rank=0, world_size=1, meeting="file:///tmp/m/ranks") == ["fairseq-train", "--cpu"]


def launch(tmp_path, program: str, *flags: str) -> int:
    script = tmp_path / "program.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(sys.argv[sys.argv.index('--distributed-rank') + 1])\n{program}")
    with patch.object(tempfile, "tempdir", str(tmp_path)):  # a killed launcher leaves its temporary folder
        return main(["launch", "--nproc", "2", *flags, "--", sys.executable, str(script)])


@pytest.mark.distributed
def test_success_exits_with_zero(tmp_path):
    assert launch(tmp_path, "sys.exit(0)") == 0


@pytest.mark.distributed
def test_a_failed_ranks_status_is_returned_and_the_others_are_stopped(tmp_path, capsys):
    assert launch(tmp_path, "sys.exit(3) if rank else time.sleep(1000)", "--grace", "0.2") == 3
    assert "rank 1 ended with exit status 3" in capsys.readouterr().err


@pytest.mark.distributed
def test_a_killed_rank_is_reported_with_its_signal(tmp_path, capsys):
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(1000)"
    assert launch(tmp_path, program, "--grace", "0.2") == 128 + signal.SIGKILL
    assert "rank 1 ended with signal 9" in capsys.readouterr().err


def sleeping_ranks(tmp_path: Path, first: str = "pass"):
    """A launcher with two sleeping ranks, and their process ids; the ranks first run the code `first`."""
    program = f"{first}\nopen({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    (launcher,) = start_ranks(1, launch, tmp_path, program, group=False)
    paths = [tmp_path / "0", tmp_path / "1"]
    while not all(path.exists() and path.read_text() for path in paths):
        time.sleep(0.01)
    return launcher, [int(path.read_text()) for path in paths]


def await_end(processes: List[int]) -> None:
    """Wait until these processes have ended. They are not our children, and stay zombies if nothing reaps orphans."""
    for process in processes:
        while not ended(process):
            time.sleep(0.01)


def ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.distributed
def test_sigterm_stops_all_ranks(tmp_path):
    launcher, processes = sleeping_ranks(tmp_path)
    launcher.kill(signal.SIGTERM)
    assert launcher.result() == 128 + signal.SIGINT
    assert all(ended(process) for process in processes)


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills children when their parent dies")
def test_killing_the_launcher_kills_all_ranks(tmp_path):
    launcher, processes = sleeping_ranks(tmp_path)
    os.kill(processes[1], signal.SIGSTOP)
    launcher.kill(signal.SIGKILL)
    launcher.process.join()
    await_end(processes)


@pytest.mark.distributed
def test_sigterm_also_ends_ranks_that_are_stopped_or_ignore_it(tmp_path):
    launcher, processes = sleeping_ranks(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    os.kill(processes[1], signal.SIGSTOP)
    launcher.kill(signal.SIGTERM)
    assert launcher.result() == 128 + signal.SIGINT
    assert all(ended(process) for process in processes)


TALK = """
import torch
from torch import distributed as dist
value = lambda flag: sys.argv[sys.argv.index(flag) + 1]
dist.init_process_group('gloo', init_method=value('--distributed-init-method'), rank=rank, world_size=2)
total = torch.ones(1)
dist.all_reduce(total)
inodes = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}')]
for name in ('tcp', 'tcp6'):
    for line in list(open(f'/proc/net/{name}'))[1:] if os.path.exists(f'/proc/net/{name}') else []:
        words = line.split()
        if words[3] == '0A' and f'socket:[{words[9]}]' in inodes:  # a listening socket of this process
            open(sys.argv[1] + f'/{rank}', 'a').write(words[1].split(':')[0] + '\\n')
dist.barrier()
"""


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="/proc/net/tcp exists only on Linux")
def test_ranks_listen_on_the_loopback_interface_only(tmp_path):
    script, found = tmp_path / "talk.py", tmp_path / "found"
    found.mkdir()
    script.write_text("import os\nimport sys\nrank = int(sys.argv[sys.argv.index('--distributed-rank') + 1])" + TALK)
    assert main(["launch", "--nproc", "2", "--", sys.executable, str(script), str(found)]) == 0
    for rank in ("0", "1"):
        addresses = (found / rank).read_text().split()  # gloo's sockets; if empty, the test looked in the wrong place
        assert addresses and set(addresses) == {"0100007F"}, addresses  # 127.0.0.1


@pytest.mark.distributed
def test_the_rendezvous_folder_is_private_and_removed(tmp_path):
    program = (
        "from stat import S_IMODE\nfolder = os.path.dirname(sys.argv[sys.argv.index('--distributed-init-method') + 1][7:])\n"
        "sys.exit(S_IMODE(os.stat(folder).st_mode) != 0o700)"
    )
    assert launch(tmp_path, program) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


@pytest.mark.distributed
def test_other_ranks_may_finish_within_the_grace_period(tmp_path):
    done = tmp_path / "done"
    program = f"rank and sys.exit(1)\ntime.sleep(0.5)\nopen({str(done)!r}, 'w').close()"
    assert launch(tmp_path, program) == 1
    assert done.exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--nproc", "2"], "nothing to launch"),
        (["--nproc", "0", "--", "fairseq-train"], "--nproc 0 must be at least 1"),
        (["--nproc", "2", "--", "no-such-program"], "no-such-program cannot be started"),
        (["--nproc", "2", "--", "/dev/null"], "/dev/null cannot be started .Permission denied"),
        (["--nproc", "2", "--grace", "nan", "--", "true"], "--grace nan must be a number of seconds between 0 and"),
        (["--nproc", "2", "--grace", "-1", "--", "true"], "--grace -1.0 must be a number of seconds between 0 and"),
    ],
)
def test_bad_arguments_give_a_one_line_error(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        main(["launch", *arguments])
