"""Curves: means over seeds, and the point at which a level is reached."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_sparsemixer.tools.study.curve import Curve, Point, count_spikes


def test_the_point_of_reaching_a_level_is_interpolated_linearly():
    curve = Curve([100, 200, 300], [10.0, 20.0, 30.0], [5.0, 4.0, 2.0])
    assert curve.first_below(3.0) == Point(250, 25, 3)
    assert curve.first_below(6.0) == Point(100, 10, 5)
    assert curve.first_below(1.9) is None


def test_a_curve_that_rises_again_counts_at_its_first_crossing():
    assert Curve([1, 2, 3], [1.0, 2.0, 3.0], [2.0, 1.0, 3.0]).first_below(1.0).updates == 2


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_level_reached_after_a_lost_validation_is_reached_at_that_validation(lost):
    """Nothing can be interpolated from NaN."""
    assert Curve([1, 2, 3], [1.0, 2.0, 3.0], [9.0, lost, 4.0]).first_below(4.5) == Point(3, 3.0, 4.0)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=8), st.floats(0.1, 10))
def test_no_validation_before_the_crossing_is_below_the_level(losses, level):
    curve = Curve(list(range(1, len(losses) + 1)), [0.0] * len(losses), losses)
    point = curve.first_below(level)
    before = losses if point is None else [loss for done, loss in enumerate(losses, 1) if done < point.updates]
    assert all(loss > level for loss in before)


def test_the_mean_uses_validations_common_to_all_curves():
    curves = [
        {"updates": [1, 2, 3], "seconds": [1, 2, 3], "losses": [4, 3, 2]},
        {"updates": [1, 3], "seconds": [3, 5], "losses": [6, 4]},
    ]
    mean = Curve.mean(curves)
    assert mean.updates == [1, 3]
    assert mean.seconds == pytest.approx([2, 4])
    assert mean.losses == pytest.approx([5, 3])


def test_only_jumps_count_as_spikes():
    assert count_spikes([5.0, 4.0, 4.5, 6.0, 3.0]) == 1


@pytest.mark.parametrize("rise, spikes", [(1.19, 0), (1.21, 1)])
def test_a_loss_a_fifth_above_the_previous_one_is_a_spike(rise, spikes):
    assert count_spikes([1.0, rise]) == spikes
