"""Real ranks for tests: W processes in a gloo group, forked from a server that has imported everything.

Starting a rank takes milliseconds instead of the seconds to import torch and fairseq, and a hung rank is killed.
"""

import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from contextlib import closing
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, Callable, List

import torch
from torch import distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["pytest", "torch", "fairseq_cli.train", "fairseq_sparsemixer"])


class Rank:
    """A running rank."""

    def __init__(self, process: multiprocessing.Process, connection: Connection):
        self.process, self.connection = process, connection

    def result(self) -> Any:
        """The function's result. Raises AssertionError with the rank's traceback or exit status if it failed."""
        try:
            failed, value = pickle.loads(self.connection.recv_bytes())
        except EOFError:
            self.process.join()
            raise AssertionError(f"{self.process.name} ended with exit status {self.process.exitcode}") from None
        assert not failed, f"{self.process.name}: {value}"
        return value

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send this rank a signal; the default kills it immediately."""
        os.kill(self.process.pid, number)


def start_ranks(world_size: int, function: Callable, *args: Any, group: bool = True) -> List[Rank]:
    """Start function(*args) on W ranks; with `group`, torch.distributed is initialised first."""
    meeting = tempfile.mktemp(prefix="ranks-")
    ranks = []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_serve, args=(rank, world_size, meeting if group else None, theirs, function, args), name=f"rank {rank}"
        )
        process.daemon = True
        process.start()
        theirs.close()
        ranks.append(Rank(process, ours))
    return ranks


def run_ranks(world_size: int, function: Callable, *args: Any, group: bool = True, deadline: float = 120) -> List[Any]:
    """The results of function(*args) on W ranks. Raises AssertionError if a rank fails, or at the deadline: a deadlock."""
    ranks = start_ranks(world_size, function, *args, group=group)
    return collect(ranks, deadline)


def collect(ranks: List[Rank], deadline: float) -> List[Any]:
    """The results of all ranks; `deadline` in seconds; see run_ranks."""
    end = time.monotonic() + deadline
    results = {}
    try:
        while len(results) < len(ranks):
            waiting = {rank.connection: index for index, rank in enumerate(ranks) if index not in results}
            ready = wait(list(waiting), timeout=max(end - time.monotonic(), 0))
            assert ready, f"ranks {sorted(waiting.values())} are still waiting after {deadline} s: a deadlock"
            for connection in ready:
                results[waiting[connection]] = ranks[waiting[connection]].result()
        return [results[index] for index in range(len(ranks))]
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.join()


def free_port() -> int:
    """A TCP port that is currently unused."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meeting_place() -> str:
    """A rendezvous URL for ranks, like that of `launch`."""
    return f"file://{tempfile.mktemp(prefix='ranks-')}"


def rank_number() -> int:
    """This process's rank, also before the group is initialised."""
    return int(multiprocessing.current_process().name.split()[-1])


def _serve(rank: int, world_size: int, meeting: str, connection: Connection, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    try:
        if meeting:
            dist.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
            )
        answer = False, function(*args)
        if meeting:
            dist.barrier()  # no rank exits while another still communicates with it
    except BaseException:
        answer = True, traceback.format_exc()
    connection.send_bytes(pickle.dumps(answer))
