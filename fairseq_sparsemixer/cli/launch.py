"""Run a fairseq command as several ranks on this machine's CPU.

On GPUs, fairseq-train starts one rank per GPU, and torchrun and srun also work. On a CPU, fairseq counts no devices and
starts no ranks: this command starts them, with fairseq's flags for each. They rendezvous through a private file and
communicate over the loopback interface: nothing listens on the network.

example:
  fairseq-sparsemixer launch --nproc 2 -- fairseq-train DATA --user-dir "$(fairseq-sparsemixer user-dir)" ...
"""

import argparse
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

from fairseq_sparsemixer.ranges import YEAR
from fairseq_sparsemixer.tools.machine import usable_cores
from fairseq_sparsemixer.tools.programs import (
    INTERRUPTED,
    child_environment,
    first_failure,
    interrupted_by_sigterm,
    running_together,
)

MOST = 1024  # ranks on one machine
HYDRA_GROUP = {"cpu": "common"}  # all other settings of a rank belong to distributed_training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The number of ranks, and the command after `--`."""
    parser.add_argument("--nproc", type=int, required=True, metavar="W", help="number of ranks")
    parser.add_argument(
        "--grace", type=float, default=30, metavar="SECONDS",
        help="when a rank fails, time for the others to report errors and exit by themselves (default: 30)",
    )  # fmt: skip
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND ...", help="fairseq-train and its arguments")


def run(options: argparse.Namespace) -> int:
    """Run all ranks. Returns the exit status of the first that failed, 0 if none did. An interrupt stops all ranks."""
    command = options.arguments[1:] if options.arguments[:1] == ["--"] else options.arguments
    if not command:
        sys.exit("fairseq-sparsemixer: nothing to launch; put the command after --, as in launch --nproc 2 -- fairseq-train ...")
    if not 1 <= options.nproc <= MOST:
        sys.exit(f"fairseq-sparsemixer: --nproc {options.nproc} must be at least 1, and at most {MOST}")
    if not 0 <= options.grace <= YEAR:  # rejects NaN too
        sys.exit(f"fairseq-sparsemixer: --grace {options.grace} must be a number of seconds between 0 and {YEAR}")
    try:
        with tempfile.TemporaryDirectory(prefix="fairseq-sparsemixer-") as folder:  # private to this user
            return run_ranks(command, options.nproc, f"file://{folder}/ranks", options.grace)
    except OSError as error:
        sys.exit(f"fairseq-sparsemixer: cannot create a folder for the rendezvous ({error}); set TMPDIR to a writable folder")


def run_ranks(command: List[str], world_size: int, meeting: str, grace: float) -> int:
    """Run `command` as world_size ranks, which rendezvous at the URL `meeting`; see run."""
    cores = usable_cores() // world_size
    environment = {"GLOO_SOCKET_IFNAME": loopback(), **child_environment(threads=cores)}  # otherwise each uses all cores
    commands = [rank_command(command, rank, world_size, meeting) for rank in range(world_size)]
    try:
        with interrupted_by_sigterm(), running_together(commands, environment) as ranks:
            return status_of(ranks, first_failure(ranks, grace))
    except KeyboardInterrupt:
        return INTERRUPTED


def loopback() -> str:
    """The loopback network interface: lo on Linux, lo0 on BSD and macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return "lo0" if "lo0" in names and "lo" not in names else "lo"


def rank_command(command: List[str], rank: int, world_size: int, meeting: str) -> List[str]:
    """The command with fairseq's settings for one of several ranks on a CPU. meeting: the URL of their rendezvous.

    Settings that are already in the command are kept.
    """
    settings = rank_settings(rank, world_size, meeting)
    if Path(command[0]).name == "fairseq-hydra-train":
        words = [f"{HYDRA_GROUP.get(name, 'distributed_training')}.{name}={value}" for name, value in settings.items()]
        return [*command, *(word for word in words if not any(given.startswith(word.split("=")[0] + "=") for given in command))]
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if flag not in command:
            flags += [flag] if value is True else [flag, str(value)]
    return [*command, *flags]


def rank_settings(rank: int, world_size: int, meeting: str) -> Dict[str, Any]:
    """fairseq's settings for one rank; for a single rank, only that it runs on the CPU."""
    if world_size == 1:
        return {"cpu": True}
    return {
        "cpu": True,
        "distributed_world_size": world_size,
        "distributed_rank": rank,
        "distributed_init_method": meeting,
        "distributed_backend": "gloo",
        "distributed_no_spawn": True,
        "device_id": 0,
        "ddp_backend": "legacy_ddp",  # fairseq passes a GPU's number to pytorch_ddp
    }


def status_of(ranks: Sequence[subprocess.Popen], failed: Optional[int]) -> int:
    """Report the failed rank. Returns its exit status as a shell would, and 0 if failed is None."""
    if failed is None:
        return 0
    status = ranks[failed].returncode
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    print(f"fairseq-sparsemixer: rank {failed} ended with {how}", file=sys.stderr)
    return status if status > 0 else 128 - status
