"""The benchmarks of whole models, on tiny models."""

import json
from argparse import Namespace

import pytest

from benchmarks import decode, estimator, train


def test_decoding_compares_both_models_on_equal_work(tmp_path):
    decode.main(
        ["--architecture", "tiny", "--batch", "2", "--length", "4", "--words", "20", "--rounds", "1", "--out", str(tmp_path)]
    )
    (case,) = json.loads((tmp_path / "decode.json").read_text())["cases"]
    assert set(case["tokens_a_second"]) == {"dense", "sparsemixer"} and case["slower_than_dense"] > 0


def test_the_estimator_is_compared_in_a_layer_and_in_a_model(tmp_path):
    estimator.main(
        ["--tokens", "16", "--dims", "8", "16", "--architecture", "tiny", "--sentences", "2", "--length", "5"]
        + ["--words", "20", "--rounds", "2", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "estimator.json").read_text())
    assert {"overhead", "switch_ms", "sparsemixer_ms"} <= set(result["layer"]) & set(result["model"])


def test_the_shares_of_all_stages_sum_to_one():
    options = Namespace(words=20, architecture="tiny", router="sparsemixer", experts=4, tokens=50)
    shares = train.shares_of_model(options)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[stage] > 0 for stage in train.STAGES) and shares["rest"] > 0
