"""95% intervals of means over seeds."""

import math

import pytest
from scipy import stats

from fairseq_sparsemixer.tools.study.intervals import mean_interval, t_quantile


@pytest.mark.parametrize("freedom, quantile", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)])
def test_the_quantiles_match_printed_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("freedom", [*range(1, 20), 63, 100, 999, 1000])
def test_the_quantiles_match_scipy(freedom, level):
    assert t_quantile(freedom, level) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


@pytest.mark.parametrize("values", [[4.0, 4.2], [5.1, 4.9, 5.0], [-1.0, 0.0, 2.0, 7.0]])
def test_the_interval_matches_a_t_test(values):
    found, test = mean_interval(values), stats.ttest_1samp(values, 0)
    low, high = test.confidence_interval(0.95)
    assert found == pytest.approx({"mean": sum(values) / len(values), "low": low, "high": high})


def test_one_value_has_no_interval_and_a_diverged_one_has_a_nan_interval():
    assert mean_interval([2.0]) == {"mean": 2.0, "low": None, "high": None}
    assert all(math.isnan(value) for value in mean_interval([2.0, math.nan]).values())
