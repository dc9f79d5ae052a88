"""Sets of rank files: all from one save, finished after a kill, or refused."""

import errno
from pathlib import Path
from typing import List, Optional
from unittest.mock import patch

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint, shards
from fairseq_sparsemixer.plugin.checkpoints.writing import STAGED, remove_unfinished


def write(path: Path, index: int, save: int, size: int = 2, updates: Optional[int] = None) -> None:
    """Write a file of rank `index` with the given save number, which is also the number of updates unless that is given."""
    state = {
        "model": {"layer.experts.weight_in": torch.full((2, 3), float(save))},
        "optimizer_history": [{"num_updates": save if updates is None else updates}],
        "expert_parallel": {"size": size, "index": index, "save": save, "optimizer": []},
    }
    torch.save(state, path)


def saves(folder: Path) -> List[int]:
    return [state["expert_parallel"]["save"] for state in shards.read_set(str(folder / "checkpoint_last.pt"))]


def mend(folder: Path) -> None:
    shards.mend(str(folder / "checkpoint_last.pt"), size=2)


LEFT = ["checkpoint_last-rank-1.pt" + STAGED, "checkpoint_1_2-rank-1.pt" + STAGED, "checkpoint_1_2-rank-1.pt"]


@pytest.mark.parametrize("left", LEFT)
def test_a_half_replaced_set_is_finished_with_the_other_ranks_file(tmp_path, left):
    write(tmp_path / "checkpoint_last-rank-0.pt", 0, save=2)
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=1)
    write(tmp_path / left, 1, save=2)
    mend(tmp_path)
    assert saves(tmp_path) == [2, 2]


def test_a_half_renamed_first_set_is_finished(tmp_path):
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=1)
    write(tmp_path / ("checkpoint_last-rank-0.pt" + STAGED), 0, save=1)
    mend(tmp_path)
    assert saves(tmp_path) == [1, 1]


def test_a_complete_set_is_kept_if_the_next_one_is_incomplete(tmp_path):
    for index in range(2):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save=1)
    write(tmp_path / ("checkpoint_last-rank-0.pt" + STAGED), 0, save=2)
    mend(tmp_path)
    assert saves(tmp_path) == [1, 1]


def test_the_best_set_is_also_finished_before_leftovers_are_removed(tmp_path):
    for index in range(2):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save=1)
    write(tmp_path / "checkpoint_best-rank-0.pt", 0, save=2)
    write(tmp_path / "checkpoint_best-rank-1.pt", 1, save=1)
    write(tmp_path / ("checkpoint_best-rank-1.pt" + STAGED), 1, save=2)
    write(tmp_path / "checkpoint_1_2-rank-0.pt", 0, save=3)
    write(tmp_path / ("checkpoint_1_2-rank-1.pt" + STAGED), 1, save=3)
    shards.mend_folder(str(tmp_path), size=2)
    remove_unfinished(str(tmp_path), staged=True)
    for name, save in (("last", 1), ("best", 2), ("1_2", 3)):
        states = shards.read_set(str(tmp_path / f"checkpoint_{name}.pt"))
        assert [state["expert_parallel"]["save"] for state in states] == [save, save]


@pytest.mark.parametrize("whole", [8, 9])
def test_of_two_saves_at_the_same_update_the_complete_one_is_used(tmp_path, whole):
    for index, save in enumerate((8, 9)):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save, updates=8)
        write(tmp_path / f"checkpoint_1_8-rank-{index}.pt", index, whole, updates=8)
    mend(tmp_path)
    assert saves(tmp_path) == [whole, whole]


def test_an_older_complete_save_is_used_if_the_newest_is_incomplete(tmp_path):
    write(tmp_path / "checkpoint_last-rank-0.pt", 0, save=2)
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=1)
    write(tmp_path / "checkpoint_1_1-rank-0.pt", 0, save=1)
    mend(tmp_path)
    assert saves(tmp_path) == [1, 1]


def test_a_save_with_all_files_still_staged_is_finished(tmp_path):
    for index in range(2):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save=[1, 5][index])
        write(tmp_path / (f"checkpoint_last-rank-{index}.pt" + STAGED), index, save=2)
    mend(tmp_path)
    assert saves(tmp_path) == [2, 2]


def test_a_damaged_file_does_not_complete_a_set(tmp_path):
    write(tmp_path / "checkpoint_last-rank-0.pt", 0, save=2)
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=1)
    (tmp_path / ("checkpoint_last-rank-1.pt" + STAGED)).write_bytes(b"PK")
    write(tmp_path / "checkpoint_2_2-rank-1.pt", 1, save=2)
    mend(tmp_path)
    assert saves(tmp_path) == [2, 2]


def test_only_the_last_set_must_be_complete(tmp_path, caplog):
    for name, saves_of in (("last", (1, 1)), ("best", (5, 4))):
        for index, save in enumerate(saves_of):
            write(tmp_path / f"checkpoint_{name}-rank-{index}.pt", index, save)
    shards.mend_folder(str(tmp_path), size=2)
    assert "checkpoint_best.pt are from different saves" in caplog.text
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=3)
    with pytest.raises(ConfigurationError, match="checkpoint_last.pt are from different saves"):
        shards.mend_folder(str(tmp_path), size=2)
    shards.mend_folder(str(tmp_path / "not there yet"), size=2)


@pytest.mark.parametrize("name", ["last", "best"])
def test_a_full_disk_ends_the_run_and_keeps_the_files_needed_to_finish(tmp_path, name):
    for index in range(2):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save=1)
        write(tmp_path / f"checkpoint_{name}-rank-{index}.pt", index, save=2 - index)
    write(tmp_path / f"checkpoint_{name}-rank-1.pt{STAGED}", 1, save=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("shutil.copyfile", side_effect=full), patch("time.sleep"):
        with pytest.raises(ConfigurationError, match=f"checkpoint_{name}-rank-1.pt cannot be written .No space left"):
            shards.mend_folder(str(tmp_path), size=2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    shards.mend_folder(str(tmp_path), size=2)
    assert len({state["expert_parallel"]["save"] for state in shards.read_set(str(tmp_path / f"checkpoint_{name}.pt"))}) == 1


def test_files_of_different_saves_are_refused(tmp_path):
    write(tmp_path / "checkpoint_last-rank-0.pt", 0, save=2)
    write(tmp_path / "checkpoint_last-rank-1.pt", 1, save=1)
    sentence = r"from different saves \(checkpoint_last-rank-0.pt at update 2, checkpoint_last-rank-1.pt at update 1\)"
    for use in (saves, mend):
        with pytest.raises(ConfigurationError, match=sentence):
            use(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    write(tmp_path / "checkpoint_last-rank-0.pt", 0, save=1)
    with pytest.raises(ConfigurationError, match="checkpoint_last-rank-1.pt is missing"):
        mend(tmp_path)
    with pytest.raises(ConfigurationError, match="checkpoint_last-rank-1.pt does not exist"):
        saves(tmp_path)


def test_another_number_of_ranks_is_refused_with_the_conversion_command(tmp_path):
    for index in range(4):
        write(tmp_path / f"checkpoint_last-rank-{index}.pt", index, save=1, size=4)
    with pytest.raises(ConfigurationError, match="over 4 ranks, but .* reshard IN OUT --expert-parallel-size 2"):
        mend(tmp_path)
    assert read_checkpoint(str(tmp_path / "checkpoint_last-rank-3.pt"))["expert_parallel"]["index"] == 3
