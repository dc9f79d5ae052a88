"""Training runs that save after every update, killed at any moment: nothing is lost, and the next run resumes and cleans up."""

import random
import re
from collections import Counter
from pathlib import Path
from typing import List

import kills
import pytest
from kills import ENDLESS, LAST, Fate
from ranks import collect

pytestmark = pytest.mark.sweep

KILLS = 36  # per kind
SECONDS = 3.0  # random kills come within this time after the start
KINDS = {"single portable": (1, []), "two ranks portable": (2, []), "two ranks sharded": (2, ["--sharded-checkpoints"])}
MINE = {  # a user's own files, with names similar to ours
    "notes.txt": "mine", "checkpoint_notes.pt.mine.tmp": "mine", "thesis.tmp": "mine", "notes.staged": "mine",
    "checkpoint_last.json": "{}", ".hidden": "mine",
}  # fmt: skip
LOST_CONTACT = re.compile(r"fairseq-sparsemixer: rank \d lost contact with another rank \(.+\); restart.*")


class Chain:
    """A folder through a series of kills and resumed runs; `faults` lists what went wrong."""

    def __init__(self, kind: str, data: Path, folder: Path):
        self.ranks, self.flags = KINDS[kind]
        self.data, self.save_dir, self.place, self.copy = data, folder / "run", folder / "place", folder / "copy"
        self.size = 2 if "--sharded-checkpoints" in self.flags else 1
        self.updates, self.faults = 0, []
        self.outcomes: Counter = Counter()
        self.moments: Counter = Counter()
        self.save_dir.mkdir()
        for name, text in MINE.items():
            (self.save_dir / name).write_text(text)

    def complain(self, faults: List[str], when: str) -> None:
        self.faults += [f"{when}: {fault}" for fault in faults]

    def kill(self, fate: Fate) -> None:
        """Run a training that is killed. Its earlier saves must stay, or be replaced by newer ones."""
        ranks = kills.start(
            self.data, self.save_dir, self.place, self.ranks, "--max-update", str(ENDLESS), *self.flags, fate=fate
        )
        others = kills.meet(fate, ranks, self.place)
        died = self.place / "died"
        self.moments[died.read_text().split()[1] if died.exists() else "at random"] += 1
        when = f"kill of {fate} ({died.read_text() if died.exists() else 'at random'})"
        self.complain([f"ends with {said!r}" for said in others if not LOST_CONTACT.fullmatch(said)], when)
        found = kills.examine(self.save_dir, self.size, self.copy)
        self.complain(found.faults, when)
        if found.updates < self.updates:
            self.complain([f"from update {self.updates} back to {found.updates}"], when)
        self.outcomes["nothing new" if found.updates == self.updates else "new save"] += 1
        self.outcomes["half files left"] += bool(kills.half_files(self.save_dir))
        self.updates = found.updates
        self.check_mine(when)

    def resume(self) -> None:
        """Run a training that resumes and ends. The folder must look as if no process had been killed."""
        goal, when = self.updates + 2, f"run from update {self.updates}"
        ranks = kills.start(self.data, self.save_dir, self.place, self.ranks, "--max-update", str(goal), *self.flags)
        ends = collect(ranks, kills.PATIENCE)
        if ends != ["done"] * self.ranks:
            return self.complain([f"ends with {ends}"], when)
        loaded = re.findall(rf"Loaded checkpoint \S+/{LAST[:-3]}\S* \(epoch \d+ @ (\d+) updates\)", kills.output(self.place))
        if (self.updates and not loaded) or {int(update) for update in loaded} - {self.updates}:
            self.complain([f"resumed from {loaded or 'nothing'}"], when)
        found = kills.examine(self.save_dir, self.size, self.copy)
        self.complain(found.faults or ([] if found.updates == goal else [f"ended at update {found.updates}"]), when)
        self.complain([f"left {name}" for name in kills.leftovers(self.save_dir, list(MINE))], when)
        self.complain(kills.surplus(self.save_dir, self.size), when)
        self.updates = goal
        self.check_mine(when)

    def check_mine(self, when: str) -> None:
        self.complain([f"lost {name}" for name, text in MINE.items() if not kept(self.save_dir / name, text)], when)


def kept(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_training_run_resumes_from_its_last_save(kind, corpus, tmp_path, capsys):
    draw = random.Random(kind)
    faults, outcomes, moments = [], Counter(), Counter()
    for number in range(4):  # folders; each has a first save, and kills of runs that finish the save of the run before
        (tmp_path / str(number)).mkdir()
        chain = Chain(kind, corpus, tmp_path / str(number))
        for _ in range(KILLS // 4):
            chain.kill(Fate.draw(draw, chain.ranks, chain.size, operations=45, seconds=SECONDS))
            if chain.faults:
                break  # further faults would have the same cause
            if draw.random() < 0.5:
                chain.resume()
        if not chain.faults:
            chain.resume()
        faults += chain.faults
        outcomes += chain.outcomes
        moments += chain.moments
    done = outcomes["new save"] + outcomes["nothing new"]
    with capsys.disabled():
        print(f"\n{kind}: {done} kills, {len(faults)} faults; {dict(outcomes)}; moments {dict(moments)}")
    assert not faults, "\n".join(faults)
