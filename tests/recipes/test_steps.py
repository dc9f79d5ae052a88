"""Restartable steps."""

import pytest
from rich.console import Console

from recipes.steps import STAMP, run_step


@pytest.fixture
def step(tmp_path):
    """step(settings, fails=False) -> what the folder held when the action started; None when it was not run."""
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


def test_an_interrupted_step_goes_on_with_what_it_had(step):
    step({"seed": 1}, fails=True)
    assert step({"seed": 1}) == ["work"]
    assert step({"seed": 1}) is None


def test_a_damaged_stamp_starts_over(step):
    step({"seed": 1})
    step.stamp.write_text('{"settings": "12')
    assert step({"seed": 1}) == []
