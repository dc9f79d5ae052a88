"""Full, read-only or removed disks: every command and training run gives a one-line error, and keeps existing files.

Programs run in separate processes, because the system kills a process that writes to a mapped file on a full disk.
"""

import json
import os
import random
import re
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Callable, List
from unittest.mock import patch

import disks
import kills
import pytest
import runs
import theirs
import yaml
from kills import LAST
from ranks import Rank, collect, start_ranks
from sandbox import LONGEST, files_below
from test_two_writers import SPEC, whole

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.checkpoints import writing
from fairseq_sparsemixer.tools.study import runner

pytestmark = pytest.mark.sweep

TRAIN_LOG = "".join(
    json.dumps(line) + "\n"
    for line in (
        {"epoch": 1, "update": 0.5, "loss": "5.1", "wps": "100", "wpb": "50", "num_updates": "1"},
        {"epoch": 1, "valid_loss": "5.0", "valid_num_updates": "1"},
        {"epoch": 2, "valid_loss": "4.0", "valid_num_updates": "2"},
    )
)
LOAD_LOG = json.dumps({"num_updates": 1, "layers": ["encoder.layers.0"], "load": [[3, 4]]}) + "\n"
PLAYER = f"""import sys
if sys.argv[1] == "fairseq-train":
    open(sys.argv[sys.argv.index("--log-file") + 1], "w").write({TRAIN_LOG!r})
    open(sys.argv[sys.argv.index("--moe-load-file") + 1], "w").write({LOAD_LOG!r})
else:
    for number in range(8): print(f"D-{{number}}\\t-1\\tw1 w2 w3 w4 w5")
"""


def say(capsys, name: str, outcomes: Counter, faults: List[str]) -> None:
    with capsys.disabled():
        print(f"\n{name}: {sum(outcomes.values())} runs, {len(faults)} faults; {dict(outcomes)}")
    assert not faults, "\n".join(faults)


def quietly(action: Callable[..., Any], errors: str, *arguments: Any) -> str:
    """Run the action. Returns "done", its error, or how else it ends. Its stderr goes to the file `errors`."""
    with open(os.devnull, "w") as nowhere, open(errors, "w") as said:
        os.dup2(nowhere.fileno(), 1), os.dup2(said.fileno(), 2)
    try:
        status = action(*arguments)
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    sys.stderr.flush()
    if isinstance(status, str) or not status:
        return status or "done"
    return f"status {status}: {Path(errors).read_text()[-500:]}"


def ended(errors: Path, action: Callable[..., Any], *arguments: Any) -> str:
    """`quietly` in a separate process, which may also end by a signal."""
    try:
        (said,) = collect(start_ranks(1, quietly, action, str(errors), *arguments, group=False), kills.PATIENCE)
    except AssertionError as error:
        return str(error)
    return said


def is_sentence(said: str, disk: Path) -> bool:
    """Whether the message is a one-line error that names a path on the disk and a remedy."""
    return (
        said.startswith("fairseq-sparsemixer: ")
        and "\n" not in said
        and len(said) < LONGEST
        and str(disk) in said
        and ";" in said
    )


def budgets(draw: random.Random, need: int, count: int) -> List[int]:
    """Bytes to leave free: none, very few, and random amounts up to a little more than needed."""
    return [0, 4096, *(int(draw.uniform(0, 1.1) * need) for _ in range(count - 2))]


def played_study(player: str, arguments: List[str]) -> int:
    runner.executable, runner.REFRESH = lambda words: [sys.executable, player, *words], 0.02
    return main(arguments)


@pytest.fixture(scope="module")
def inputs(corpus, tmp_path_factory) -> Path:
    """The commands' inputs, on a disk with space."""
    folder = tmp_path_factory.mktemp("inputs")
    runs.train(corpus, folder / "moe", *theirs.FLAGS, updates=1)
    runs.train(corpus, folder / "dense", "--router", "dense", updates=1)
    theirs.write_theirs(folder / "moe" / LAST, folder / "theirs.pt")
    assert main(["reshard", str(folder / "moe" / LAST), str(folder / "two.pt"), "--expert-parallel-size", "2"]) == 0
    (folder / "train.log").write_text(TRAIN_LOG)
    (folder / "load.jsonl").write_text(LOAD_LOG)
    (folder / "bin").symlink_to(corpus)
    (folder / "reference.en").write_text((corpus.parent / "valid.en").read_text())
    (folder / "study.yaml").write_text(yaml.safe_dump(SPEC, sort_keys=False))
    (folder / "player.py").write_text(PLAYER)
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").write_text("sentence1\tsentence2\tscore\n" + "w1\tw2\t2.5\n" * 200)
    return folder


def commands(inputs: Path, corpus: Path, disk: Path):
    """The commands that write to the disk, by name."""
    moe = str(inputs / "moe" / LAST)
    glue = ["glue", "STS-B", "--raw-dir", str(inputs), "--dict", str(corpus / "dict.de.txt"), "--dest-dir", str(disk / "glue")]
    study = ["study", str(inputs / "study.yaml"), "--out", str(disk / "study"), "--workers", "1"]
    return {
        "reshard to two files": (main, ["reshard", moe, str(disk / "out.pt"), "--expert-parallel-size", "2"]),
        "reshard to one file": (main, ["reshard", str(inputs / "two.pt"), str(disk / "out.pt"), "--portable"]),
        "convert": (main, ["convert", str(inputs / "theirs.pt"), str(disk / LAST), "--json", str(disk / "out.json")]),
        "upcycle": (main, ["upcycle", str(inputs / "dense" / LAST), str(disk / LAST), "--num-experts", "4"]),
        "inspect --json": (main, ["inspect", moe, "--json", str(disk / "out.json")]),
        "plot": (main, ["plot", str(inputs), "--out", str(disk / "plots"), "--json", str(disk / "out.json")]),
        "fidelity": (main, ["fidelity", "--tokens", "4", "--num-experts", "3", "--model-dim", "4", "--draws", "8",
                            "--json", str(disk / "out.json"), "--png", str(disk / "out.png")]),
        "glue": (main, glue),
        "study": (played_study, str(inputs / "player.py"), study),
    }  # fmt: skip


NAMES = (
    "reshard to two files",
    "reshard to one file",
    "convert",
    "upcycle",
    "inspect --json",
    "plot",
    "fidelity",
    "glue",
    "study",
)
KEEPS = ("study",)  # commands that resume, and therefore keep unfinished work
FIRST = {"fidelity": "out.json"}  # files that are complete before the next one is started


def quick_retries(action: Callable[..., Any], *arguments: Any) -> Any:
    """Run the action without the pauses between attempts to write."""
    with patch.object(writing, "PAUSE", 0.05):
        return action(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_commands_on_a_full_disk(name, inputs, corpus, tmp_path, capsys):
    draw, outcomes, faults = random.Random(name), Counter(), []
    with disks.small_disk(tmp_path / "disk", 64) as disk:
        call = commands(inputs, corpus, disk)[name]
        before = os.statvfs(disk).f_bfree
        assert ended(tmp_path / "errors", quick_retries, *call) == "done"
        need = (before - os.statvfs(disk).f_bfree) * os.statvfs(disk).f_frsize
        made = files_below(disk)
        for budget in budgets(draw, need, 10):
            again = draw.random() < 0.5  # overwrite existing files
            if not again:
                empty(disk)
            elif name in KEEPS:
                shutil.rmtree(disk / "study" / "runs")  # all runs were finished
            disks.leave_free(disk, budget)
            before = files_below(disk)
            said = ended(tmp_path / "errors", quick_retries, *call)
            after = files_below(disk)
            when = f"{budget:,} of {need:,} bytes free: "
            lost = [path for path in before if path not in after or said != "done" and before[path] != after[path]]
            new = [path for path in after if path not in before and said != "done" and name not in KEEPS or path.endswith(".tmp")]
            if name in KEEPS:
                lost = [path for path in lost if path not in made]
            lost, new = ([path for path in paths if os.path.basename(path) != FIRST.get(name)] for paths in (lost, new))
            faults += [f"{when}changes {path}" for path in lost] + [f"{when}leaves {path}" for path in new]
            if said != "done" and not is_sentence(said, disk):
                faults.append(f"{when}ends with {said!r}")
            outcomes["done" if said == "done" else "refused"] += 1
            (disk / disks.FILLER).unlink(missing_ok=True)
            said = ended(tmp_path / "errors", quick_retries, *call)  # with free space
            faults += [f"{when}afterwards {said!r}"] if said != "done" else []
    say(capsys, f"{name} on a full disk", outcomes, faults)


def empty(disk: Path) -> None:
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def quickstart(out: str) -> None:
    from recipes.quickstart.__main__ import main as recipe

    recipe(["--out", out, "--pairs", "1000", "--updates", "20", "--routers", "sparsemixer"])


def test_a_recipe_on_a_full_disk(tmp_path, capsys):
    """Rerun with more space each time, the recipe resumes until it is done."""
    outcomes, faults = Counter(), []
    with disks.small_disk(tmp_path / "disk", 128) as disk:
        for budget in (0, 30_000, 200_000, 3_000_000, 128 << 20):
            disks.leave_free(disk, budget)
            said = ended(tmp_path / "errors", quickstart, str(disk / "out"))
            if said != "done" and not is_sentence(said, disk):
                faults.append(f"{budget:,} bytes free: ends with {said!r}")
            faults += [f"{budget:,} bytes free: leaves {path}" for path in disk.rglob("*.tmp")]
            faults += [fault for path in disk.rglob("*.pt") for fault in kills.faults_of(path)]
            outcomes["done" if said == "done" else "ended with an error"] += 1
    say(capsys, "a recipe on a full disk", outcomes, faults)
    assert said == "done"


QUICK = ["--max-update", "2", "--collective-timeout", "8"]  # ranks wait for one that ends early


def test_commands_on_a_read_only_disk(inputs, corpus, tmp_path, capsys):
    outcomes, faults = Counter(), []
    with disks.small_disk(tmp_path / "disk", 64) as disk:
        (disk / "notes.txt").write_text("mine")
        with disks.read_only(disk):
            for name, call in commands(inputs, corpus, disk).items():
                said = ended(tmp_path / "errors", quick_retries, *call)
                faults += [] if is_sentence(said, disk) else [f"{name} ends with {said!r}"]
                outcomes["refused"] += 1
            for ranks, flags in ((1, []), (2, []), (2, ["--sharded-checkpoints"])):
                for save_dir in (disk, disk / "run"):
                    started = kills.start(corpus, save_dir, tmp_path / "place", ranks, *QUICK, *flags)
                    ends = collect(started, kills.PATIENCE)
                    faults += [] if any(is_sentence(said, disk) for said in ends) else [f"training ends with {ends}"]
                    outcomes["refused"] += 1
        assert files_below(disk).keys() == {str(disk / "notes.txt")}
    say(capsys, "a read-only disk", outcomes, faults)


def train_impatiently(*arguments: Any) -> str:
    return quick_retries(kills.train_rank, *arguments)


LOST_CONTACT = re.compile(r"fairseq-sparsemixer: rank \d lost contact with another rank \(.+\); restart.*")


@pytest.mark.parametrize("kind, count", [("single", 14), ("two ranks", 6), ("two ranks sharded", 6)])
def test_training_on_a_full_disk(kind, count, corpus, tmp_path, capsys):
    draw, outcomes, faults = random.Random(kind), Counter(), []
    ranks, flags = 1 if kind == "single" else 2, ["--sharded-checkpoints"] if "sharded" in kind else []
    runs.train(corpus, tmp_path / "one", updates=1)
    size = (tmp_path / "one" / LAST).stat().st_size
    with disks.small_disk(tmp_path / "disk", 64) as disk:
        save_dir, updates = disk / "run", 0
        flags += [
            "--moe-load-file",
            str(disk / "run" / "load.jsonl"),
            "--moe-load-interval",
            "1",
            "--log-file",
            str(disk / "run" / "train.log"),
        ]
        for _ in range(count):
            budget = draw.choice([0, 4096, int(draw.uniform(0, 12) * size)])
            when = f"{budget / size:.1f} checkpoints free, after update {updates}: "
            save_dir.mkdir(exist_ok=True)
            (save_dir / "notes.txt").write_text("mine")
            disks.leave_free(disk, budget)
            ends = trained(corpus, save_dir, tmp_path / "place", ranks, updates + 4, flags)
            faults += [f"{when}{fault}" for fault in complaints(ends, disk, tmp_path / "place")]
            (disk / disks.FILLER).unlink(missing_ok=True)
            found = kills.examine(save_dir, 2 if "sharded" in kind else 1, tmp_path / "disk" / ".copy")
            shutil.rmtree(tmp_path / "disk" / ".copy", ignore_errors=True)
            faults += [f"{when}{fault}" for fault in found.faults]
            faults += [f"{when}from {updates} back to {found.updates}"] if found.updates < updates else []
            own = ["notes.txt", "load.jsonl", "train.log"]
            left = [name for name in kills.leftovers(save_dir, own) if not name.endswith(".staged")]
            faults += [f"{when}leaves {name}" for name in left]
            faults += [f"{when}notes.txt is lost"] if (save_dir / "notes.txt").read_text() != "mine" else []
            outcomes["done" if ends == ["done"] * ranks else "ended with an error"] += 1
            updates = found.updates
            if draw.random() < 0.4:
                continue  # the next run starts with the leftovers on a full disk
            ends = trained(corpus, save_dir, tmp_path / "place", ranks, found.updates + 1, flags)
            faults += [f"{when}with free space again {ends}"] if ends != ["done"] * ranks else []
            faults += [f"{when}left {name}" for name in kills.leftovers(save_dir, own)]
            updates = found.updates + 1
            if draw.random() < 0.4:
                shutil.rmtree(save_dir)
                updates = 0
    say(capsys, f"training on a full disk, {kind}", outcomes, faults)


def trained(corpus: Path, save_dir: Path, place: Path, ranks: int, updates: int, flags: List[str]) -> List[str]:
    """Train, and return how each rank ends."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    meeting = kills.meeting_place()
    arguments = (corpus, save_dir, place, ranks, meeting, None, "--max-update", str(updates), *flags)
    return ends_of(start_ranks(ranks, train_impatiently, *arguments, group=False))


def ends_of(ranks: List[Rank]) -> List[str]:
    """Each rank's result, or the end of its error."""
    ends = []
    for rank in ranks:
        try:
            ends += collect([rank], kills.PATIENCE)
        except AssertionError as error:
            ends.append(str(error)[-1500:])
    return ends


def complaints(ends: List[str], disk: Path, place: Path) -> List[str]:
    """Faults in how the ranks end: a traceback, an unrelated error, or no error about the disk."""
    if ends == ["done"] * len(ends):
        return []
    wrong = [said for said in ends if not (said == "done" or is_sentence(said, disk) or LOST_CONTACT.fullmatch(said))]
    told = any(is_sentence(said, disk) and not LOST_CONTACT.fullmatch(said) for said in ends)
    return [f"ends with {said!r}" for said in wrong] + ([] if told else [f"no error names the disk: {ends}"])


@pytest.mark.parametrize("kind, count", [("single", 12), ("two ranks", 5), ("two ranks sharded", 5)])
def test_removing_the_save_dir_during_training(kind, count, corpus, tmp_path, capsys):
    draw, outcomes, faults = random.Random(kind), Counter(), []
    ranks, flags = 1 if kind == "single" else 2, ["--sharded-checkpoints"] if "sharded" in kind else []
    for number in range(count):
        save_dir = tmp_path / "run"
        shutil.rmtree(save_dir, ignore_errors=True)
        started = kills.start(corpus, save_dir, tmp_path / "place", ranks, "--max-update", "24", *flags)
        wait_for(lambda: save_dir.exists())
        time.sleep(draw.uniform(0, 3))
        vanished = save_dir.exists()
        os.rename(save_dir, tmp_path / f"gone{number}") if draw.random() < 0.5 else shutil.rmtree(save_dir, ignore_errors=True)
        ends = ends_of(started)
        faults += complaints(ends, tmp_path, tmp_path / "place")
        faults += whole(save_dir) if save_dir.exists() else []
        faults += [f"left {name}" for name in (kills.leftovers(save_dir, []) if save_dir.exists() else [])]
        outcomes["continues in a new folder" if ends == ["done"] * ranks else "ended with an error"] += vanished
    say(capsys, f"a folder that vanishes, {kind}", outcomes, faults)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + kills.PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
