"""Headroom: the gap between dense and experts, and the warning if it is too small."""

import numpy as np
import pytest
from study_runs import runs, text

from fairseq_sparsemixer.tools.study.headroom import headroom

WARNING = "cannot tell routers apart"


def test_a_gap_is_a_difference_of_means_with_the_pooled_deviation_of_seeds():
    dense, switch = [5.0, 5.2, 5.1], [4.7, 4.8, 5.0]
    (gap,) = headroom(runs("dense", dense) + runs("switch", switch, 4), "switch")
    assert (gap["model"], gap["dense"], gap["figure"], gap["seeds"]) == ("switch-e4", "dense", "valid loss", [1, 2, 3])
    assert gap["gap"] == pytest.approx(np.mean(dense) - np.mean(switch))
    assert gap["deviation"] == pytest.approx(np.sqrt((np.var(dense, ddof=1) + np.var(switch, ddof=1)) / 2))


@pytest.mark.parametrize(
    "test, figure, sign",
    [
        (lambda loss: {"score": 10 * loss, "signature": "s"}, "BLEU", 1),
        (lambda loss: {"score": 2**loss, "bits": loss}, "perplexity", -1),
    ],
)
def test_higher_bleu_and_lower_perplexity_are_better(test, figure, sign):
    dense, switch = [5.0, 5.2], [4.0, 4.2]
    loss, other = headroom(runs("dense", dense, test=test) + runs("switch", switch, 4, test=test), "switch")
    means = [np.mean([test(value)["score"] for value in values]) for values in (dense, switch)]
    assert other["figure"] == figure and loss["gap"] > 0
    assert other["gap"] == pytest.approx(sign * (means[1] - means[0]))


def test_only_common_seeds_count():
    (gap,) = headroom(runs("dense", [5.0, 5.2, 99.0]) + runs("switch", [4.0, 4.2], 4), "switch")
    assert gap["seeds"] == [1, 2] and gap["gap"] == pytest.approx(1)


@pytest.mark.parametrize(
    "switch, distinct",
    [([4.81, 5.01], True), ([4.82, 5.02], False), ([5.11, 5.31], False)],  # the deviation is 0.1414, so two are 0.283
)
def test_gaps_below_two_deviations_or_zero_give_a_warning(switch, distinct):
    (gap,) = headroom(runs("dense", [5.1, 5.3]) + runs("switch", switch, 4), "switch")
    assert gap["distinct"] is distinct
    assert (WARNING in text(runs("dense", [5.1, 5.3]), runs("switch", switch, 4))) is not distinct


def test_the_wide_model_has_its_own_gap_and_is_never_the_dense_model():
    members = runs("wide", [4.0, 4.1]) + runs("dense", [5.0, 5.1]) + runs("switch", [4.5, 4.6], 4)
    gaps = headroom(members, "switch", "wide")
    assert [(gap["model"], gap["dense"]) for gap in gaps] == [("wide", "dense"), ("switch-e4", "dense")]
    assert [gap["gap"] for gap in gaps] == pytest.approx([1, 0.5])


def test_a_dense_baseline_is_compared_with_the_first_variant_with_experts():
    members = runs("dense", [5.0, 5.1]) + runs("ours", [4.5, 4.6], 4) + runs("switch", [4.0, 4.1], 4)
    assert [(gap["model"], gap["dense"]) for gap in headroom(members, "dense")] == [("ours-e4", "dense")]


def test_one_warning_names_each_number_of_experts():
    switch = [runs("switch", losses, experts) for experts, losses in {4: [5.0, 5.2], 8: [1.0, 1.2], 16: [6.0, 6.2]}.items()]
    shown = text(runs("dense", [5.0, 5.2]), *switch)
    assert shown.count(WARNING) == 1 and "or negative: switch-e4 (valid loss), switch-e16 (valid loss).\n" in shown


def test_one_seed_has_a_gap_and_no_deviation():
    shown = text(runs("dense", [5.0]), runs("switch", [4.0], 4))
    assert "One seed gives no standard deviation." in shown and WARNING not in shown
    assert WARNING in text(runs("dense", [5.0]), runs("switch", [5.0], 4))


def test_without_a_dense_model_the_report_says_what_is_missing():
    assert "Unknown: it takes finished runs, with the same seed, of a dense variant" in text(runs("switch", [4.0], 4))


def test_a_diverged_run_has_no_distinct_gap():
    shown = text(runs("dense", [5.0, 5.2]), runs("switch", [4.0, float("nan")], 4))
    assert WARNING in shown and "nan" in shown and "switch-e4 (valid loss, where training diverged)" in shown
