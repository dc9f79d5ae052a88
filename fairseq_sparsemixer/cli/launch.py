"""Run a fairseq command as several ranks on this machine's CPU.

On GPUs, fairseq-train starts a rank for each by itself, and torchrun and srun work as well; on a CPU fairseq counts no
devices and starts nothing. This starts the ranks and adds fairseq's flags for them.

example:
  fairseq-sparsemixer launch --nproc 2 -- fairseq-train DATA --user-dir "$(fairseq-sparsemixer user-dir)" ...
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Dict, List, Tuple

from fairseq_sparsemixer.processes import INTERRUPTED, interrupted_by_sigterm, stop

HELP = "run a fairseq command as several ranks on the CPU"
HYDRA_GROUP = {"cpu": "common"}  # all other settings of a rank belong to distributed_training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of ranks, and the command behind `--`."""
    parser.add_argument("--nproc", type=int, required=True, metavar="W", help="number of ranks")
    parser.add_argument("--port", type=int, help="TCP port where the ranks meet (default: a free one)")
    parser.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS",
        help="when a rank fails, time for the others to say why and end by themselves (default: 30)",
    )  # fmt: skip
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="fairseq-train and its arguments")


def run(options: argparse.Namespace) -> int:
    """Start all ranks and wait for them; the exit status of the first that failed, 0 when none did. An interruption ends all."""
    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command:
        sys.exit("fairseq-sparsemixer: nothing to launch; put the command behind --, as in launch --nproc 2 -- fairseq-train ...")
    if options.nproc < 1:
        sys.exit(f"fairseq-sparsemixer: --nproc {options.nproc} must be at least 1")
    port = options.port or free_port()
    threads = str(max((os.cpu_count() or 1) // options.nproc, 1))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}  # each rank would take all cores otherwise
    ranks: List[subprocess.Popen] = []
    try:
        with interrupted_by_sigterm():
            for rank in range(options.nproc):
                ranks.append(subprocess.Popen(rank_command(command, rank, options.nproc, port), env=environment))
            return wait_for(ranks, options.grace)
    except KeyboardInterrupt:
        return INTERRUPTED
    except FileNotFoundError:
        sys.exit(f"fairseq-sparsemixer: {command[0]} is no command here; is it installed in this environment?")
    finally:
        stop(ranks)


def rank_command(command: List[str], rank: int, world_size: int, port: int) -> List[str]:
    """The command with what fairseq needs to run as one rank of several on a CPU.

    A setting that the command gives itself is left alone.
    """
    settings = rank_settings(rank, world_size, port)
    if Path(command[0]).name == "fairseq-hydra-train":
        words = [f"{HYDRA_GROUP.get(name, 'distributed_training')}.{name}={value}" for name, value in settings.items()]
        return [*command, *(word for word in words if not any(given.startswith(word.split("=")[0] + "=") for given in command))]
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if flag not in command:
            flags += [flag] if value is True else [flag, str(value)]
    return [*command, *flags]


def rank_settings(rank: int, world_size: int, port: int) -> Dict[str, Any]:
    """fairseq's settings for one rank; with a single one, only that it runs on the CPU."""
    if world_size == 1:
        return {"cpu": True}
    return {
        "cpu": True,
        "distributed_world_size": world_size,
        "distributed_rank": rank,
        "distributed_init_method": f"tcp://127.0.0.1:{port}",
        "distributed_backend": "gloo",
        "distributed_no_spawn": True,
        "device_id": 0,
        "ddp_backend": "legacy_ddp",  # fairseq hands pytorch_ddp a GPU's number
    }


def free_port() -> int:
    """A TCP port nobody listens on at the moment."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(ranks: List[subprocess.Popen], grace: float) -> int:
    """Wait until all ranks have ended, or `grace` seconds after the first failure: the exit status of that one, else 0."""
    failed: Tuple[int, float] = (0, 0.0)
    while any(rank.poll() is None for rank in ranks):
        if not failed[0]:
            failed = first_failure(ranks), time.monotonic()
        elif time.monotonic() > failed[1] + grace:
            break
        time.sleep(0.05)
    return failed[0] or first_failure(ranks)


def first_failure(ranks: List[subprocess.Popen]) -> int:
    """Report a rank that has failed, and give its exit status as a shell would; 0 when there is none."""
    for number, rank in enumerate(ranks):
        if rank.poll():
            how = f"signal {-rank.returncode}" if rank.returncode < 0 else f"exit status {rank.returncode}"
            print(f"fairseq-sparsemixer: rank {number} ended with {how}", file=sys.stderr)
            return rank.returncode if rank.returncode > 0 else 128 - rank.returncode
    return 0
