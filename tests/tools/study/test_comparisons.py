"""Comparison of a model with the baseline, paired by seed."""

import math

import numpy as np
import pytest
from scipy import stats
from study_runs import runs, text

from fairseq_sparsemixer.tools.study.comparisons import compare


def test_the_difference_is_paired_by_seed():
    own, baseline = [4.0, 5.1, 6.0], [4.2, 5.2, 6.3]  # seeds differ far more than models
    found = compare(runs("ours", own, 4), runs("switch", baseline, 4))
    test = stats.ttest_rel(own, baseline).confidence_interval(0.95)
    assert (found["baseline"], found["seeds"]) == ("switch-e4", [1, 2, 3])
    assert found["difference"] == pytest.approx({"mean": -0.2, "low": test.low, "high": test.high})


def test_the_speed_up_is_computed_per_seed():
    """The baseline has its final losses, 4 and 5, after 30 updates; the model after 15, between two validations, and after 10."""
    baseline = runs("switch", [4.0, 5.0], 4, curves=[[8.0, 6.0], [8.0, 6.0]])
    found = compare(runs("ours", [1.0, 1.0], 4, curves=[[6.0, 2.0], [5.0, 2.0]]), baseline)
    ratios = np.array([30 / 15, 30 / 10])
    half = stats.t.ppf(0.975, 1) * ratios.std(ddof=1) / np.sqrt(2)
    for unit in ("updates", "seconds"):  # 10 updates take 5 seconds
        expected = {"mean": 2.5, "low": 2.5 - half, "high": 2.5 + half}
        assert found["speed_up"][unit] == pytest.approx(expected)
    assert found["not_reached"] == []


def test_a_baseline_is_timed_to_the_first_point_as_good_as_its_end():
    found = compare(*(runs(name, [4.0], 4, curves=[[4.0, 3.0]]) for name in ("ours", "switch")))
    assert found["speed_up"]["updates"]["mean"] == 1


def test_seeds_that_never_reach_the_loss_are_reported_and_give_no_mean():
    baseline = runs("switch", [4.0, 4.0, 4.0], 4)
    found = compare(runs("ours", [3.0, 4.1, 4.0], 4), baseline)
    assert found["not_reached"] == [2] and found["speed_up"] == {"updates": None, "seconds": None}
    assert "not reached by 1 of 3 seeds" in text(baseline, runs("ours", [3.0, 4.1, 4.0], 4))
    shown = text(baseline, runs("ours", [5.0, 4.1, 4.2], 4))
    assert "| not reached " in shown and "not reached by" not in shown


def test_one_seed_gives_no_interval_and_the_report_says_so():
    shown = text(runs("switch", [4.0], 4), runs("ours", [3.0], 4))
    assert "One seed gives no interval." in shown and "| -1.000 " in shown and "[nan" not in shown
    assert "One seed" not in text(runs("switch", [4.0, 4.1], 4), runs("ours", [3.0, 3.2], 4)).split("### Headroom")[0]


def test_only_common_seeds_are_compared():
    assert compare(runs("ours", [3.0, 9.0], 4), runs("switch", [4.0], 4))["seeds"] == [1]
    assert compare(runs("ours", [3.0, 9.0], 4)[1:], runs("switch", [4.0], 4)) is None


@pytest.mark.parametrize("own, baseline", [(math.nan, 4.0), (4.0, math.nan), (math.inf, 4.0), (4.0, math.inf)])
def test_a_diverged_run_has_no_difference_and_no_speed_up(own, baseline):
    found = compare(runs("ours", [own, 3.0], 4, curves=[[9.0]] * 2), runs("switch", [baseline, 4.0], 4))
    assert not math.isfinite(found["difference"]["mean"]) and found["speed_up"]["updates"] is None


def test_a_log_without_times_gives_a_speed_up_only_in_updates():
    """A run shorter than --log-interval logs no times."""
    members = [runs(name, [4.0], 4) for name in ("ours", "switch")]
    for run in sum(members, []):
        run["curve"]["seconds"] = [0.0, 0.0]
    found = compare(*members)["speed_up"]
    assert found["updates"]["mean"] == 1 and found["seconds"] is None
