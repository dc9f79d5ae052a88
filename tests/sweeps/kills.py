"""Training runs of one or two ranks that are killed at their n-th operation on a file in --save-dir, or at a random time."""

import os
import random
import re
import shutil
import signal
import time
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, List, NamedTuple, Optional
from unittest.mock import patch

import torch
from ranks import Rank, collect, meeting_place, rank_number, start_ranks
from runs import EXPERTS, SMALL, run

import fairseq_sparsemixer
from fairseq_sparsemixer.cli.launch import rank_command
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint, shards

LAST = "checkpoint_last.pt"
USER_DIR = Path(fairseq_sparsemixer.__file__).parent
FLAGS = [
    *(flag for flag in SMALL if flag != "--disable-validation"), *EXPERTS, "--required-batch-size-multiple", "1",
    "--no-progress-bar", "--save-interval-updates", "1", "--keep-interval-updates", "2", "--keep-last-epochs", "1",
    "--keep-best-checkpoints", "2", "--collective-timeout", "15",
]  # fmt: skip
ENDLESS = 100_000  # updates
PATIENCE = 120  # seconds; only a hung process takes longer
OWN_NAME = re.compile(r"checkpoint(\d+|_\d+_\d+|_last|_best|\.best_loss_[\d.]+)(-rank-\d)?\.pt")
HALF = re.compile(r"checkpoint.*\.pt(\.staged)?(\.\d+-[0-9a-f]+\.tmp)?")


class Fate(NamedTuple):
    """The rank to kill, and the file operation before or after which to kill it. together: also kill the other rank then.

    operation: None to kill it from outside, `delay` seconds after the start.
    """

    victim: int
    operation: Optional[int]
    after: bool
    together: bool
    delay: float = 0.0

    @classmethod
    def draw(cls, draw: random.Random, ranks: int, writers: int, operations: int, seconds: float) -> "Fate":
        """A random Fate: three of four at a file operation of the first `writers` ranks. operations, seconds: upper limits."""
        aimed = draw.random() < 0.75
        operation = draw.randrange(1, operations + 1) if aimed else None
        victim = draw.randrange(writers if aimed else ranks)
        return cls(victim, operation, draw.random() < 0.5, draw.random() < 0.5, draw.uniform(0, seconds))

    def __str__(self) -> str:
        when = f"{'after' if self.after else 'before'} operation {self.operation}" if self.operation else f"at {self.delay:.2f} s"
        return f"rank {self.victim} {when}{', and the other' if self.together else ''}"


class _Counter:
    """Counts file operations in the folder, and kills the process at that of `fate`."""

    def __init__(self, fate: Fate, folder: Path, pids: Path):
        self.fate, self.folder, self.pids, self.count = fate, os.path.realpath(folder), pids, 0

    def is_ours(self, place: Any) -> bool:
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        return isinstance(place, (str, os.PathLike)) and os.path.realpath(place).startswith(self.folder)

    def die(self, what: str) -> None:
        (self.pids / "died").write_text(what)
        if self.fate.together:
            kill_all(self.pids)
        os.kill(os.getpid(), signal.SIGKILL)

    def around(self, name: str, function: Callable, place: Callable) -> Callable:
        """`function`, counted; place(*arguments) is its file. A kill after a save or copy leaves half of the file."""

        def counted(*arguments: Any, **options: Any) -> Any:
            where = place(*arguments)
            if not self.is_ours(where):
                return function(*arguments, **options)
            self.count += 1
            now = self.count == self.fate.operation
            what = f"{name} {os.path.basename(str(where))}"
            if now and not self.fate.after:
                self.die(f"before {what}")
            result = function(*arguments, **options)
            if now:
                if name in ("save", "copyfile"):
                    os.truncate(where, os.path.getsize(where) // 2)
                self.die(f"after {what}")
            return result

        return counted


OPERATIONS = {  # the file among a function's arguments
    (os, "replace"): lambda source, target: target,
    (os, "fsync"): lambda descriptor: descriptor,
    (os, "remove"): lambda path: path,
    (torch, "save"): lambda obj, path, *_: path,
    (shutil, "copyfile"): lambda source, target, *_: target,
}


@contextmanager
def met(fate: Optional[Fate], folder: Path, pids: Path) -> Iterator[None]:
    """Apply the fate, if it is at a file operation, while the context is open."""
    with ExitStack() as patches:
        if fate is not None and fate.operation is not None:
            counter = _Counter(fate, folder, pids)
            for (module, name), place in OPERATIONS.items():
                patches.enter_context(patch.object(module, name, counter.around(name, getattr(module, name), place)))
        yield


def kill_all(pids: Path) -> None:
    """Send SIGKILL to the ranks noted in the folder, except this process."""
    for note in pids.glob("rank*"):
        if int(note.read_text()) != os.getpid():
            os.kill(int(note.read_text()), signal.SIGKILL)


def train_rank(data: Path, save_dir: Path, place: Path, ranks: int, meeting: str, fate: Optional[Fate], *flags: str) -> str:
    """Run fairseq-train on this rank. Returns "done" or its error. place: folder for the output and the ranks' process ids."""
    import fairseq_cli.train

    rank = rank_number() if ranks > 1 else 0
    note = place / f".rank{rank}"
    note.write_text(str(os.getpid()))
    os.replace(note, place / f"rank{rank}")
    with open(place / f"output{rank}", "a") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    command = ["fairseq-train", str(data), "--user-dir", str(USER_DIR), *FLAGS, "--save-dir", str(save_dir), *flags]
    with met(fate if fate and fate.victim == rank else None, save_dir, place):
        try:
            run(fairseq_cli.train.cli_main, *rank_command(command, rank, ranks, meeting)[1:])
        except SystemExit as end:
            return str(end)
    return "done"


def start(data: Path, save_dir: Path, place: Path, ranks: int, *flags: str, fate: Optional[Fate] = None) -> List[Rank]:
    """Start fairseq-train on `ranks` ranks."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return start_ranks(ranks, train_rank, data, save_dir, place, ranks, meeting_place(), fate, *flags, group=False)


def meet(fate: Fate, ranks: List[Rank], place: Path) -> List[str]:
    """Wait for the kill, or do it. Returns how the remaining ranks end."""
    if fate.operation is None:
        time.sleep(fate.delay)
        for rank in ranks if fate.together else [ranks[fate.victim]]:
            rank.kill()
    victim = ranks[fate.victim].process
    victim.join(PATIENCE)
    assert victim.exitcode == -signal.SIGKILL, f"not killed, but {victim.exitcode}: {output(place)[-2000:]}"
    others = [rank for rank in ranks if rank is not ranks[fate.victim]]
    if fate.together:
        for rank in others:
            rank.process.join(PATIENCE)
        return []
    return collect(others, PATIENCE)


def output(place: Path) -> str:
    """The output of all ranks."""
    return "".join(path.read_text(errors="replace") for path in sorted(place.glob("output*")))


@dataclass
class Found:
    """A folder after a kill: the updates of its last checkpoint (0: none), and its faults."""

    updates: int
    faults: List[str]


def examine(folder: Path, size: int, copy: Path) -> Found:
    """Check that every checkpoint is complete, and that the last one, once the next run has finished it, is from one save.

    size: files per checkpoint. Works in `copy`, so that the folder itself is left for the next run.
    """
    faults = [fault for path in sorted(folder.glob("checkpoint*.pt")) for fault in faults_of(path)]
    if faults:
        return Found(0, faults)
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in folder.glob("checkpoint*"):
        os.link(path, copy / path.name)
    try:
        if size > 1:
            shards.mend_folder(str(copy), size)
            name = shards.shard_path(str(copy / LAST), 0)
            states = shards.read_set(str(copy / LAST)) if os.path.exists(name) else []
        else:
            states = [read_checkpoint(str(copy / LAST))] if (copy / LAST).exists() else []
    except ValueError as error:
        return Found(0, [str(error)])
    return Found(shards.updates(states[0]) if states else 0, [])


def faults_of(path: Path) -> List[str]:
    """The faults of a file, including wrong checksums, which torch does not verify."""
    try:
        damaged = zipfile.ZipFile(path).testzip()
        read_checkpoint(str(path))
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        return [f"{path.name}: {error}"]
    return [f"{path.name}: {damaged} is damaged"] if damaged else []


def leftovers(folder: Path, own: List[str]) -> List[str]:
    """Files that are neither checkpoints under fairseq's names nor `own`."""
    return sorted(path.name for path in folder.iterdir() if not OWN_NAME.fullmatch(path.name) and path.name not in own)


def surplus(folder: Path, ranks_of_file: int) -> List[str]:
    """Kinds of checkpoints with more files than the flags keep, or with a missing rank file."""
    found = [OWN_NAME.fullmatch(path.name) for path in folder.iterdir()]
    kinds = {"updates": r"_\d+_\d+", "epochs": r"\d+", "best": r"\.best.*"}
    faults = []
    for kind, most in (("updates", 2), ("epochs", 1), ("best", 2)):
        names = [match.group(1) for match in found if match and re.fullmatch(kinds[kind], match.group(1))]
        if len(set(names)) > most:
            faults.append(f"{len(set(names))} checkpoints of {kind}: {sorted(set(names))}")
        faults += [f"{name} has {names.count(name)} files" for name in set(names) if names.count(name) != ranks_of_file]
    return faults


def half_files(folder: Path) -> List[str]:
    """Unfinished checkpoint files, which have not been renamed."""
    return [path.name for path in folder.iterdir() if HALF.fullmatch(path.name) and not OWN_NAME.fullmatch(path.name)]
