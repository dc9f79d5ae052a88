"""Resumable steps."""

import errno
import io
import os
import threading
import time

import pytest
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.session import Recipe, main
from recipes.common.steps import STAMP, finished, run_step, state_of
from recipes.multi30k_en_de.__main__ import CONFIG


@pytest.fixture
def step(tmp_path):
    """step(settings, fails=False) -> the folder's files when the action started; None if it did not run."""
    found = []

    def action(fails, folder, console):
        found.append(sorted(path.name for path in folder.iterdir() if path.name != STAMP))
        (folder / "work").write_text("")
        if fails:
            raise KeyboardInterrupt

    def step(settings, fails=False):
        found.clear()
        try:
            run_step("a step", tmp_path / "step", settings, Console(quiet=True), action, fails)
        except KeyboardInterrupt:
            pass
        return found[0] if found else None

    step.stamp = tmp_path / "step" / STAMP
    return step


def test_a_finished_step_is_not_run_again(step):
    assert step({"seed": 1}) == []
    assert step({"seed": 1}) is None


def test_a_changed_setting_starts_over_in_an_empty_folder(step):
    step({"seed": 1})
    assert step({"seed": 2}) == []


def test_an_interrupted_step_keeps_its_files(step):
    step({"seed": 1}, fails=True)
    assert step({"seed": 1}) == ["work"]
    assert step({"seed": 1}) is None


def test_a_changed_setting_also_starts_over_after_a_failure(step):
    step({"seed": 1}, fails=True)
    assert step({"seed": 2}) == []


def refuses(step, settings, message):
    """Check that run_step refuses a step with these settings, state_of says so, and no file changes."""
    folder = step.stamp.parent
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigurationError, match=message):
        step(settings)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert state_of(folder, settings).startswith("would be refused: ")


@pytest.mark.parametrize("stamp", [None, "", '{"settings": "12', "[]", '{"settings": 1, "finished": true}', "[" * 9999])
def test_a_folder_made_by_no_step_is_refused_and_kept(step, stamp):
    folder = step.stamp.parent
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if stamp is not None:
        step.stamp.write_text(stamp)
    refuses(step, {"seed": 1}, "has files .such as thesis.txt.*choose another --out, or delete the folder yourself")


def test_a_checkpoint_is_never_removed(step):
    step({"seed": 1})
    (step.stamp.parent / "checkpoint_last.pt").write_bytes(b"days of training")
    refuses(step, {"seed": 2}, "holds a run with other settings and the checkpoint checkpoint_last.pt")
    step.stamp.unlink()
    refuses(step, {"seed": 1}, "no valid step.json")


@pytest.mark.parametrize("change", ["new", "edited", "link"])
def test_a_finished_step_with_user_files_is_not_started_over(step, tmp_path, change):
    step({"seed": 1})
    work = step.stamp.parent / "work"
    if change == "new":
        (work.parent / "sub").mkdir()
        (work.parent / "sub" / "notes").write_text("mine")
    elif change == "edited":
        work.write_text("corrected by hand")
    else:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "work").write_text("mine")
        (work.parent / "there").symlink_to(tmp_path / "elsewhere")
    refuses(step, {"seed": 2}, "was made with other settings, and its file .* is new or changed")
    assert step({"seed": 1}) is None


def test_a_file_that_existed_before_the_step_is_not_treated_as_its_own(step):
    step({"seed": 1}, fails=True)
    (step.stamp.parent / "notes").write_text("mine")
    assert step({"seed": 1}) == ["notes", "work"]
    refuses(step, {"seed": 2}, "its file notes is new or changed")


def test_a_stamps_temporary_file_is_not_a_user_file(step):
    step.stamp.parent.mkdir()
    step.stamp.with_name(f"{STAMP}.123-abc.tmp").write_text("{")
    step({"seed": 1})
    assert finished(step.stamp.parent)


def test_only_one_of_two_concurrent_processes_runs_the_step(tmp_path):
    done, entered = [], threading.Event()

    def action(folder, console):
        entered.set()
        time.sleep(0.2)
        done.append(folder)

    def work(screen):
        run_step("a step", tmp_path / "step", {"seed": 1}, Console(file=screen, width=200), action)

    said = io.StringIO()
    first, second = (threading.Thread(target=work, args=(screen,)) for screen in (io.StringIO(), said))
    first.start()
    entered.wait()
    second.start()
    first.join()
    second.join()
    assert len(done) == 1 and "waiting for another process" in said.getvalue() and "done before" in said.getvalue()


def test_a_file_instead_of_the_folder_is_refused(step):
    step.stamp.parent.write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a folder"):
        step({"seed": 1})


@pytest.mark.parametrize(
    "raw, refused", [("P/data", True), ("P/data/raw", True), ("P", False), ("P/downloads", False), ("raw", False)]
)
def test_raw_data_inside_the_output_folder_is_refused_before_it_is_read(tmp_path, raw, refused):
    recipe = Recipe("some", CONFIG, "", lambda session: None, lambda session: None, lambda session: None)
    (tmp_path / raw).mkdir(parents=True)
    call = ["prepare", "--raw-dir", str(tmp_path / raw), "--out", str(tmp_path / "P")]
    if refused:
        with pytest.raises(ConfigurationError, match="--raw-dir .* is inside --out"):
            main(recipe, call)
    else:
        main(recipe, call)


NUMBERS = {"--seed": -1, "--updates": 0, "--num-experts": 0, "--gpus": -1, "--nodes": 0, "--device-tokens": -5, "--workers": 0}


@pytest.mark.parametrize("flag, value", [*NUMBERS.items(), ("--seed", 2**32)])
def test_out_of_range_numbers_are_refused(flag, value):
    recipe = Recipe("some", CONFIG, "", lambda session: None, lambda session: None, lambda session: None)
    with pytest.raises(ConfigurationError, match=f"{flag} {value} must be at least"):
        main(recipe, ["train", flag, str(value)])


def test_a_full_disk_gives_a_one_line_error(tmp_path):
    def fill(session):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some file")

    with pytest.raises(ConfigurationError, match="some file cannot be used .No space left on device"):
        main(Recipe("some", CONFIG, "", fill, fill, fill), ["prepare", "--out", str(tmp_path)])
