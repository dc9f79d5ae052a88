"""`launch`: the flags each rank gets, and what happens when one fails."""

import os
import signal
import sys
import time

import pytest
from ranks import start_ranks

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.cli.launch import rank_command


def test_each_rank_gets_fairseq_its_flags():
    assert rank_command(["fairseq-train", "data", "--fp16"], rank=1, world_size=2, port=9999) == (
        "fairseq-train data --fp16 --cpu --distributed-world-size 2 --distributed-rank 1 --distributed-init-method"
        " tcp://127.0.0.1:9999 --distributed-backend gloo --distributed-no-spawn --device-id 0 --ddp-backend legacy_ddp"
    ).split(" ")


def test_hydra_gets_overrides():
    command = rank_command(["/bin/fairseq-hydra-train", "task.data=x"], rank=0, world_size=4, port=9999)
    assert command[2:4] == ["common.cpu=True", "distributed_training.distributed_world_size=4"]
    assert "distributed_training.ddp_backend=legacy_ddp" in command


def test_what_the_user_sets_stays():
    command = rank_command(["fairseq-train", "--cpu", "--ddp-backend", "no_c10d"], rank=0, world_size=2, port=9999)
    assert command.count("--cpu") == 1 and command.count("--ddp-backend") == 1


def test_one_rank_needs_no_process_group():
    assert rank_command(["fairseq-train"], rank=0, world_size=1, port=9999) == ["fairseq-train", "--cpu"]


def launch(tmp_path, program: str, *flags: str) -> int:
    script = tmp_path / "program.py"
    script.write_text(f"import os, signal, sys, time\nrank = int(sys.argv[sys.argv.index('--distributed-rank') + 1])\n{program}")
    return main(["launch", "--nproc", "2", *flags, "--", sys.executable, str(script)])


def test_success_is_status_zero(tmp_path):
    assert launch(tmp_path, "sys.exit(0)") == 0


def test_a_failed_rank_gives_its_status_and_ends_the_others(tmp_path, capsys):
    assert launch(tmp_path, "sys.exit(3) if rank else time.sleep(1000)", "--grace", "0.2") == 3
    assert "rank 1 ended with exit status 3" in capsys.readouterr().err


def test_a_killed_rank_is_reported_with_its_signal(tmp_path, capsys):
    program = "os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(1000)"
    assert launch(tmp_path, program, "--grace", "0.2") == 128 + signal.SIGKILL
    assert "rank 1 ended with signal 9" in capsys.readouterr().err


def test_sigterm_ends_all_ranks(tmp_path):
    pids = [tmp_path / "0", tmp_path / "1"]
    program = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(os.getpid()))\ntime.sleep(1000)"
    (launcher,) = start_ranks(1, launch, tmp_path, program, group=False)
    while not all(path.exists() and path.read_text() for path in pids):
        time.sleep(0.01)
    launcher.kill(signal.SIGTERM)
    assert launcher.result() == 128 + signal.SIGINT
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)


def test_others_may_end_by_themselves_within_the_grace(tmp_path):
    done = tmp_path / "done"
    program = f"rank and sys.exit(1)\ntime.sleep(0.5)\nopen({str(done)!r}, 'w').close()"
    assert launch(tmp_path, program) == 1
    assert done.exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--nproc", "2"], "nothing to launch"),
        (["--nproc", "0", "--", "fairseq-train"], "--nproc 0 must be at least 1"),
        (["--nproc", "2", "--", "no-such-program"], "no-such-program is no command here"),
    ],
)
def test_mistakes_get_one_sentence(arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        main(["launch", *arguments])
