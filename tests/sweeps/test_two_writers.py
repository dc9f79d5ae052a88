"""Two writers in one folder, started at random times: one continues, the other gives a one-line error, files are complete."""

import os
import random
import re
import sys
import time
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path
from typing import List

import kills
import pytest
import runs
import theirs
import yaml
from kills import ENDLESS, LAST
from ranks import Rank, collect, start_ranks

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.tools.study import runner
from fairseq_sparsemixer.tools.study.spec import read_study

pytestmark = pytest.mark.sweep

BY = r"by process \d+ on \S+, which (is training|is writing a checkpoint there); wait.*"
IN_USE = rf"fairseq-sparsemixer: --save-dir \S+ is in use {BY}"
OVERWRITTEN = rf"fairseq-sparsemixer: \S+ may be overwritten {BY}"
# errors of a training run that reads a command's output
NO_MATCH = r"fairseq-sparsemixer: (\S+ does not fit this run|the flags have|the router of the checkpoint has) .*"


def say(capsys, name: str, outcomes: Counter, faults: List[str]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {sum(outcomes.values())} pairs, {len(faults)} faults; {dict(outcomes)}")
    assert not faults, "\n".join(faults)


def whole(folder: Path) -> List[str]:
    """The faults of the checkpoints in a folder."""
    return [fault for path in folder.glob("*.pt") for fault in kills.faults_of(path)]


def goes_on(folder: Path, ranks: List[Rank]) -> bool:
    """Whether a training run saves again."""
    before, end = last_save(folder), time.monotonic() + kills.PATIENCE
    while time.monotonic() < end and all(rank.process.is_alive() for rank in ranks):
        if last_save(folder) > before:
            return True
        time.sleep(0.02)
    return False


def last_save(folder: Path) -> int:
    """The mtime of the last checkpoint in nanoseconds; 0 if there is none."""
    return max((path.stat().st_mtime_ns for path in folder.glob("checkpoint_last*.pt")), default=0)


def end(ranks: List[Rank]) -> None:
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join()


@pytest.mark.parametrize("kind, pairs", [("single", 14), ("two ranks", 5), ("two ranks sharded", 5)])
def test_two_training_runs(kind, pairs, corpus, tmp_path, capsys):
    draw, outcomes, faults = random.Random(kind), Counter(), []
    ranks, flags = 1 if kind == "single" else 2, ["--sharded-checkpoints"] if "sharded" in kind else []
    for number in range(pairs):
        save_dir, offset = (
            tmp_path / f"run{number // 2}",
            draw.choice([0, draw.uniform(0, 3)]),
        )  # every folder is used twice: new, and with an existing run
        first = kills.start(corpus, save_dir, tmp_path / "first", ranks, "--max-update", str(ENDLESS), *flags)
        time.sleep(offset)
        second = kills.start(corpus, save_dir, tmp_path / "second", ranks, "--max-update", str(ENDLESS), *flags)
        ready = wait([rank.connection for rank in first + second], kills.PATIENCE)
        lost, won = (first, second) if any(rank.connection in ready for rank in first) else (second, first)
        said = collect(lost, kills.PATIENCE)
        when = f"{offset:.2f} s apart"
        faults += [f"{when}: ends with {sentence!r}" for sentence in said if not re.fullmatch(IN_USE, sentence)]
        if not goes_on(save_dir, won):
            faults.append(f"{when}: the other does not continue: {kills.output(tmp_path / 'first')[-500:]}")
        end(won)
        found = kills.examine(save_dir, 2 if flags else 1, tmp_path / "copy")
        faults += [f"{when}: {fault}" for fault in found.faults]
        outcomes["first continues" if won is first else "second continues"] += 1
    last = kills.start(corpus, save_dir, tmp_path / "last", ranks, "--max-update", str(found.updates + 1), *flags)
    faults += [f"then: {sentence}" for sentence in collect(last, kills.PATIENCE) if sentence != "done"]
    faults += [f"left {name}" for name in kills.leftovers(save_dir, [])]
    say(capsys, f"two training runs, {kind}", outcomes, faults)


def command(arguments: List[str]) -> str:
    """Run a fairseq-sparsemixer command. Returns "done" or its error."""
    with open(os.devnull, "w") as out:
        os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
    try:
        return "done" if not main(arguments) else "failed"
    except SystemExit as error:
        return str(error)


@pytest.fixture(scope="module")
def sources(corpus, tmp_path_factory):
    """Commands that write a checkpoint, by name; the target is appended."""
    folder = tmp_path_factory.mktemp("sources")
    runs.train(corpus, folder / "moe", *theirs.FLAGS, updates=1)
    runs.train(corpus, folder / "dense", "--router", "dense", updates=1)
    theirs.write_theirs(folder / "moe" / LAST, folder / "theirs.pt")
    runs.train(corpus, folder / "same", updates=1)
    return {
        "reshard": ["reshard", "--portable", str(folder / "same" / LAST)],
        "upcycle": ["upcycle", "--num-experts", "4", "--moe-freq", "1", "--router", "switch", str(folder / "dense" / LAST)],
        "convert": ["convert", str(folder / "theirs.pt")],
    }


@pytest.mark.parametrize("name", ["reshard", "upcycle", "convert"])
def test_a_command_and_a_training_run(name, corpus, sources, tmp_path, capsys):
    draw, outcomes, faults = random.Random(name), Counter(), []
    for number in range(8):
        save_dir, offset = tmp_path / f"run{number}", draw.uniform(-0.5, 2.5)
        save_dir.mkdir()
        target = str(save_dir / LAST)
        if offset < 0:
            (tool,) = start_ranks(1, command, [*sources[name], target], group=False)
            time.sleep(-offset)
        ranks = kills.start(corpus, save_dir, tmp_path / "place", 1, "--max-update", str(ENDLESS))
        if offset >= 0:
            time.sleep(offset)
            (tool,) = start_ranks(1, command, [*sources[name], target], group=False)
        (said,) = collect([tool], kills.PATIENCE)
        when = f"{offset:.2f} s after the training's start"
        if goes_on(save_dir, ranks):
            trained = "continues"
        else:
            (trained,) = collect(ranks, kills.PATIENCE)
        end(ranks)
        faults += [f"{when}: {fault}" for fault in whole(save_dir)]
        faults += [f"{when}: left {file}" for file in kills.half_files(save_dir) if said == "done" and trained != "continues"]
        refused, stopped = re.fullmatch(OVERWRITTEN, said), re.fullmatch(f"{IN_USE}|{NO_MATCH}", trained)
        if not (refused and trained == "continues" or said == "done" and (stopped or trained == "continues")):
            faults.append(f"{when}: {name} ends with {said!r}, the training {trained!r}")
        outcomes["the command was refused" if refused else f"the command wrote, then the training {trained[:60]}"] += 1
    say(capsys, f"{name} and a training", outcomes, faults)


def test_two_commands(sources, tmp_path, capsys):
    draw, outcomes, faults = random.Random(1), Counter(), []
    for number in range(16):
        target = str(tmp_path / LAST)
        (first,) = start_ranks(1, command, [*sources[draw.choice(sorted(sources))], target], group=False)
        time.sleep(draw.uniform(0, 0.1))
        (second,) = start_ranks(1, command, [*sources[draw.choice(sorted(sources))], target], group=False)
        said = collect([first, second], kills.PATIENCE)
        faults += [sentence for sentence in said if sentence != "done" and not re.fullmatch(OVERWRITTEN, sentence)]
        faults += [f"pair {number}: neither wrote"] if "done" not in said else []
        outcomes["both wrote, one after the other" if said == ["done"] * 2 else "one was refused"] += 1
        faults += [*whole(tmp_path), *(f"left {path.name}" for path in tmp_path.iterdir() if path.name != LAST)]
    say(capsys, "two commands", outcomes, faults)


SPEC = {
    "title": "tiny", "data": "bin", "num-experts": [2], "seeds": [1], "baseline": "switch",
    "routers": {"switch": {"router": "switch"}},
    "flags": {
        "task": "translation", "arch": "transformer_moe_tiny", "encoder-layers": 1, "decoder-layers": 1, "lr": 0.01,
        "criterion": "moe_cross_entropy", "optimizer": "adam", "batch-size": 4, "max-update": 6, "save-interval-updates": 2,
        "keep-interval-updates": 1, "log-interval": 1, "num-workers": 0,
    },
    "test": {
        "metric": "bleu", "reference": "reference.en",
        "flags": {"gen-subset": "valid", "beam": 1, "max-len-b": 10, "required-batch-size-multiple": 1},
    },
}  # fmt: skip
PLAYER = """import sys, time
time.sleep(0.2)
if sys.argv[1] == "fairseq-train":
    with open(sys.argv[sys.argv.index("--log-file") + 1], "a") as log:
        print('{"valid_loss": "5", "valid_num_updates": "6"}', file=log)
else:
    for number in range(8): print(f"D-{number}\\t-1\\tw1")
"""


@pytest.fixture
def study(corpus, tmp_path) -> Path:
    (tmp_path / "bin").symlink_to(corpus)
    (tmp_path / "reference.en").write_text((corpus.parent / "valid.en").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    return tmp_path / "study.yaml"


def test_two_studies(study, tmp_path, capsys):
    """Each run is trained by one study while the other waits for it, and both succeed."""
    draw, outcomes, faults = random.Random(1), Counter(), []
    for number in range(3):
        out, offset = tmp_path / f"out{number}", draw.uniform(0, 15)
        arguments = ["study", str(study), "--out", str(out), "--workers", "1"]
        first = start_ranks(1, command, arguments, group=False)
        time.sleep(offset)
        second = start_ranks(1, command, arguments, group=False)
        said = collect(first + second, 2 * kills.PATIENCE)
        run = out / "runs" / "switch-e2-seed1"
        text = (run / "output.txt").read_text()
        faults += [f"{offset:.1f} s apart: {sentence}" for sentence in said if sentence != "done"]
        faults += [f"{offset:.1f} s apart: {text.count('done training')} trainings"] if text.count("done training") != 1 else []
        faults += [*whole(run / "checkpoints"), *(f"left {path}" for path in out.rglob("*.tmp"))]
        outcomes["both succeed"] += said == ["done"] * 2
    say(capsys, "two studies", outcomes, faults)


def run_played(spec: Path, out: Path, player: Path) -> str:
    """Run a study with PLAYER instead of fairseq. Returns "done" or its error."""
    runner.executable, runner.REFRESH = lambda words: [sys.executable, str(player), *words], 0.02
    try:
        return "; ".join(runner.run_study(read_study(spec), out, workers=1)) or "done"
    except SystemExit as error:
        return str(error)


def test_two_studies_with_different_flags(study, tmp_path, capsys):
    draw, outcomes, faults = random.Random(1), Counter(), []
    (tmp_path / "player.py").write_text(PLAYER)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**SPEC, "flags": {**SPEC["flags"], "lr": 0.02}}, sort_keys=False))
    for number in range(20):
        specs, started, out = draw.sample([study, other], 2), [], tmp_path / f"out{number}"
        for spec in specs:
            started += start_ranks(1, run_played, spec, out, tmp_path / "player.py", group=False)
            time.sleep(draw.choice([0, draw.uniform(0, 0.5)]))
        said = collect(started, kills.PATIENCE)
        refused = [
            sentence for sentence in said if re.fullmatch(r"fairseq-sparsemixer: \S+ was begun with other flags, .*", sentence)
        ]
        if len(refused) != 1 or said.count("done") != 1:
            faults.append(f"pair {number}: {said}")
        faults += [f"left {path}" for path in out.rglob("*.tmp")]
        outcomes["one was refused"] += len(refused) == 1
    say(capsys, "two studies with different flags", outcomes, faults)
