"""The benchmarks' measuring tools."""

import json

import pytest
import torch

from benchmarks import measuring


def test_steps_alternate_once_per_round():
    order = []
    timings = measuring.time_interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3, warmup=1)
    assert order == list("ab" * 4)
    assert len(timings["a"].seconds) == 3 and timings["a"].median > 0


def test_a_ratio_is_taken_within_rounds():
    slow_machine = measuring.Timing([2.0, 20.0, 2.0]), measuring.Timing([1.0, 10.0, 1.0])
    assert measuring.ratio(*slow_machine) == 2


def test_the_spread_is_the_interquartile_range_over_the_median():
    assert measuring.Timing([1.0, 2.0, 3.0, 4.0, 5.0]).spread == pytest.approx(2 / 3)
    assert measuring.Timing([1.0]).spread == 0


def test_growth_exponents_of_powers_are_exact():
    assert measuring.growth_exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert measuring.growth_exponent([8], [1.0]) is None


def test_reading_a_tensor_from_the_host_is_counted():
    values = torch.arange(4)
    with measuring.HostSynchronisations() as syncs:
        values.sum()
    assert syncs.count == 0
    with measuring.HostSynchronisations() as syncs:
        values.tolist(), values[0].item(), values.nonzero()
    assert sorted(syncs.seen) == ["_local_scalar_dense", "nonzero", "tolist"]


def test_peak_memory_sees_what_a_step_allocates_and_frees():
    peak = measuring.peak_memory(lambda: torch.ones(1 << 24).sum())  # 64 MiB
    if peak is None:
        pytest.skip("this system does not report a process's peak resident memory")
    assert 60 << 20 < peak < 160 << 20


def test_results_include_hardware_and_date(tmp_path):
    measuring.write_json(tmp_path / "new" / "result.json", {"cases": []})
    written = json.loads((tmp_path / "new" / "result.json").read_text())
    assert {"date", "device", "torch"} <= set(written["hardware"]) and written["cases"] == []
