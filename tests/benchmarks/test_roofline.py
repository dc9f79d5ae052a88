"""The cost model on costs made by hand, its table of devices, and one run of the program on counted kernels."""

import argparse
import json

import pytest

from benchmarks import roofline
from benchmarks.cluster_plan import make_plan, reduction_seconds
from benchmarks.costs import Case, Costs, Kernel
from benchmarks.devices import (
    MESSAGE,
    ORDERING,
    Device,
    exchange_seconds,
    in_one_step,
    in_two_steps,
    kernel_seconds,
    layer_times,
    read_devices,
)
from benchmarks.fake_cuda import shim

HEADER = ",".join(Device._fields)
# All figures are such that 1e12 bytes or FLOPs take one second at the assumed efficiency.
UNIT = Device("unit", 9, 80, 1 / 0.9, 1 / 0.8, 0.5 / 0.8, 1000 / 0.8, 500 / 0.8, 1e6)


def costs(*kernels, sent=(), saved=0):
    return Costs([(Kernel(*kernel), times) for kernel, times in kernels], 0, list(sent), saved)


def test_the_table_has_the_four_devices_with_positive_figures():
    devices = read_devices()
    assert list(devices) == ["A100", "H100", "H200", "B200"]
    assert [device.capability for device in devices.values()] == [8, 9, 9, 10]
    assert devices["H100"].memory_tb_s == 3.35 and devices["H100"].bf16_tflops == 989
    assert devices["H200"].memory_tb_s > devices["H100"].memory_tb_s


def test_comments_and_blank_lines_of_a_table_are_skipped(tmp_path):
    table = tmp_path / "devices.csv"
    table.write_text(f"# a comment\n{HEADER}\n\nnew,9,80,3,1000,60,400,50,5\n")
    assert read_devices(table) == {"new": Device("new", 9, 80, 3, 1000, 60, 400, 50, 5)}


@pytest.mark.parametrize(
    "line, complaint",
    [("new,9,80,3,1000,60,400,50", "needs a number"), ("new,9,80,fast,1000,60,400,50,5", "needs a number"),
     ("new,9,80,0,1000,60,400,50,5", "not positive"), ("new,9,80,nan,1000,60,400,50,5", "not positive")],
)  # fmt: skip
def test_an_incomplete_line_of_a_table_is_refused(line, complaint, tmp_path):
    table = tmp_path / "devices.csv"
    table.write_text(f"{HEADER}\n{line}\n")
    with pytest.raises(ValueError, match=f"'name': 'new'.*{complaint}"):
        read_devices(table)


def test_a_kernel_is_limited_by_memory_or_by_arithmetic():
    assert kernel_seconds(Kernel("copy", 3 * 10**12, 0, False), UNIT) == pytest.approx(3)
    assert kernel_seconds(Kernel("mm", 3 * 10**12, 4 * 10**12, False), UNIT) == pytest.approx(4)
    assert kernel_seconds(Kernel("mm", 5 * 10**12, 4 * 10**12, False), UNIT) == pytest.approx(5)
    assert kernel_seconds(Kernel("mm", 3 * 10**12, 4 * 10**12, True), UNIT) == pytest.approx(8)


def test_a_layer_takes_its_kernels_and_their_launches():
    times = layer_times(costs((("mm", 1, 2 * 10**12, False), 2), (("add", 10**12, 0, False), 3)), UNIT)
    assert times == pytest.approx((4, 3, 5)) and times.total == pytest.approx(12)


def test_an_exchange_uses_the_links_between_its_ranks():
    layer = costs(sent=[8 * 10**12])  # 1e12 bytes to each of 8 ranks
    assert exchange_seconds(layer, 1, UNIT, 8) == 0
    assert exchange_seconds(layer, 8, UNIT, 8) == pytest.approx(7 + 1)  # NVLink and a launch
    assert exchange_seconds(layer, 8, UNIT, 1) == pytest.approx(2 * 7 + 1)  # InfiniBand, half as fast
    assert exchange_seconds(layer, 8, UNIT, 4) == pytest.approx(2 * 4 + 1)  # 4 ranks in another node; NVLink has finished


def test_two_steps_trade_messages_between_nodes_for_a_pass_over_nvlink_and_a_copy():
    layer = costs(sent=[16 * 10**12])  # 1e12 bytes to each of 16 ranks, on 4 nodes of 4
    one, two = in_one_step(layer, 16, UNIT, 4), in_two_steps(layer, 16, UNIT, 4)
    assert one == pytest.approx((2 * 12 + 1, 12))
    assert two == pytest.approx((12 + 2 * 16 + 2 * 12 + 3 + ORDERING, 3))  # NVLink, the copy, InfiniBand, launches
    assert one.total == pytest.approx(25 + 12 * MESSAGE)


def test_a_reduction_sends_a_tensor_twice():
    assert reduction_seconds(10**12, 1, 8, UNIT) == 0
    assert reduction_seconds(10**12, 4, 1, UNIT) == pytest.approx(2 * 2 * 3 / 4)
    assert reduction_seconds(10**12, 4, 2, UNIT) == pytest.approx(2 * 3 / 4)


def test_a_plan_names_what_binds():
    layer = costs((("mm", 1, 10**12, False), 1))
    case = Case("switch", 1024, 64, 1, 64, 256, 8, 9)
    plan = make_plan(case, layer, layer, UNIT)
    assert plan.binds == "feed-forward" and plan.seconds["feed-forward"] == pytest.approx(24 * 2)
    assert plan.tokens == 512 * 1024
    assert make_plan(case, layer, layer._replace(sent=[10**14]), UNIT).binds == "all-to-all"
    assert make_plan(case, layer, layer._replace(saved=10**11), UNIT).binds == "memory"
    halved = make_plan(case._replace(group=16), layer, layer, UNIT)
    assert plan.parameters - halved.parameters == 20 * 12 * 4 * 2 * 64 * 256  # 4 of 64 experts a layer less on each rank


def parsed(*arguments):
    return roofline.build_parser().parse_args(arguments)


def test_the_dense_layer_is_one_time_itself():
    model = roofline.Model(parsed(), {"unit": UNIT})
    case = model.case(UNIT, 1024, 8, 2)
    dense = model.dense(case)
    model.costs = {dense: costs((("mm", 7, 9, False), 5)), case: costs((("mm", 7, 9, False), 5), (("add", 1, 0, False), 5))}
    assert model.multiple(dense, UNIT) == 1
    assert model.multiple(case, UNIT) == pytest.approx(2)
    assert dense.top_k == 2 and model.dense(case._replace(experts=64, group=8, capability=10)) == dense


def test_goals_show_the_share_of_launches():
    devices = {"unit": UNIT}
    model = roofline.Model(argparse.Namespace(**{**vars(parsed()), "device": ["unit"]}), devices)
    model.goals(UNIT)
    for case in model.missing:
        model.costs[case] = costs((("mm", 1, 10**12, False), 10 if case.layer == "dense" else 45))
    first = model.goals(UNIT)[0]
    assert first["model"] == 4.5 and first["launching"] == first["products"] == 2.25
    assert first["with 35 launches"] == 4.0 and first["launches"] == 45


def test_help_and_errors_need_no_compiler(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        roofline.main(["--help"])
    assert "Nothing is measured" in capsys.readouterr().out
    for arguments, complaint in [
        (["--device", "V100"], "--device V100 is not in"),
        (["--devices", str(tmp_path / "none.csv")], "--devices: "),
        (["--tokens", "100"], "--tokens 100 is not a multiple of --experts 8"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            roofline.main(arguments)
        assert complaint in capsys.readouterr().err
    monkeypatch.setattr(shim, "why_not", lambda: "no C++ compiler")
    with pytest.raises(SystemExit, match="The kernels cannot be counted here: no C.. compiler"):
        roofline.main([])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(shim.why_not() is not None, reason=f"kernels cannot be counted: {shim.why_not()}")
def test_the_program_prints_and_writes_its_tables(tmp_path, capsys):
    small = ["--tokens", "64", "--experts", "4", "--groups", "1", "2", "--top-k", "1", "--dims", "16x32"]
    roofline.main([*small, "--json", str(tmp_path / "roofline.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "roofline.json").read_text())
    assert "nothing measured" in printed and "datasheet figures" in printed
    assert all(title in printed for title in written["tables"])
    (grid,) = written["tables"]["H100: multiples of dense, without all-to-all"]
    assert grid["S"] == 64 and grid["E=4 G=1"] > 1 and grid["E=4 G=2"] > 1
    assert [line["device"] for line in written["tables"]["Devices, all experts on one GPU"]] == ["A100", "H100", "H200", "B200"]
    assert not any("goals" in title for title in written["tables"])  # they are for other dimensions
