"""`fairseq-sparsemixer reshard`: conversion between any layouts, bit for bit, optimizer state included."""

import json
import os
from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

import pytest
import runs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard

E, M = 8, 3


def made_up(dtype: torch.dtype = torch.float32) -> Dict[str, Any]:
    """A random portable checkpoint: two layers with experts, other weights, an EMA copy, Adam's state for all."""
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int):
        return torch.randn(*shape, generator=generator).to(dtype)

    def weights():
        return {
            "embed": random(5, M),
            "encoder.layers.0.fc1.moe.experts.weight_in": random(E, M, 4),
            "encoder.layers.0.fc1.moe.experts.bias_in": random(E, 4),
            "encoder.layers.0.fc1.moe.gate.projection.weight": random(E, M),
            "decoder.layers.0.fc1.moe.experts.weight_in": random(E, M, 4),
        }

    model = weights()
    model["tied"] = model["embed"]
    shapes = [weight.shape for weight in weights().values()]
    moments = {i: {"step": 7, "exp_avg": random(*s), "exp_avg_sq": random(*s)} for i, s in enumerate(shapes)}
    return {
        "model": model,
        "cfg": {"model": {"arch": "transformer_moe"}},
        "extra_state": {"ema": weights(), "ema_fp32_params": weights(), "val_loss": 3.5},
        "optimizer_history": [{"num_updates": 7}],
        "last_optimizer_state": {"state": moments, "param_groups": [{"lr": 0.1, "params": list(moments)}]},
        "expert_parallel": {"size": 1, "index": 0, "save": None, "optimizer": [1, 2, 4]},
    }


def assert_identical(one: Any, other: Any) -> None:
    """Check that tensors are identical bit for bit and everything else is equal."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_identical(one[key], other[key])
    elif torch.is_tensor(one):
        assert one.dtype == other.dtype and torch.equal(one, other)
    else:
        assert one == other


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(sizes=st.lists(st.sampled_from([1, 2, 4, 8]), max_size=4), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_conversion_through_any_layouts_and_back_changes_no_bit(tmp_path_factory, sizes: List[int], dtype: torch.dtype):
    folder = tmp_path_factory.mktemp("layouts")
    torch.save(made_up(dtype), folder / "0.pt")
    for step, size in enumerate([*sizes, 1]):
        reshard(str(folder / f"{step}.pt"), str(folder / f"{step + 1}.pt"), size)
    assert_identical(read_checkpoint(str(folder / "0.pt")), read_checkpoint(str(folder / f"{len(sizes) + 1}.pt")))


def test_each_file_has_its_own_experts_and_all_other_weights(tmp_path):
    whole = made_up()
    torch.save(whole, tmp_path / "whole.pt")
    reshard(str(tmp_path / "whole.pt"), str(tmp_path / "parts.pt"), 4)
    for index in range(4):
        part = read_checkpoint(str(tmp_path / f"parts-rank-{index}.pt"))
        rows = slice(2 * index, 2 * index + 2)
        for name, value in whole["model"].items():
            expected = value[rows] if ".experts." in name else value
            assert torch.equal(part["model"][name], expected)
        for i, state in whole["last_optimizer_state"]["state"].items():
            expected = state["exp_avg"][rows] if i in (1, 2, 4) else state["exp_avg"]
            assert torch.equal(part["last_optimizer_state"]["state"][i]["exp_avg"], expected)
        assert part["expert_parallel"]["size"] == 4 and part["expert_parallel"]["index"] == index


def test_a_rank_file_is_no_larger_than_its_content(tmp_path):
    whole = made_up()
    whole["model"] = {"layer.experts.weight_in": torch.randn(E, 100, 100)}
    for key in ("extra_state", "last_optimizer_state"):
        whole[key] = {}
    torch.save(whole, tmp_path / "whole.pt")
    reshard(str(tmp_path / "whole.pt"), str(tmp_path / "parts.pt"), 8)
    assert (tmp_path / "parts-rank-7.pt").stat().st_size < 1.2 * 100 * 100 * 4
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".pt")] == []


@pytest.mark.slow
def test_a_trained_checkpoint_generates_the_same_after_conversion(corpus, tmp_path, capsys):
    runs.train(corpus, tmp_path / "run", updates=1)
    trained = tmp_path / "run" / "checkpoint_last.pt"
    assert main(["reshard", str(trained), str(tmp_path / "two.pt"), "--expert-parallel-size", "2"]) == 0
    figures = tmp_path / "figures.json"
    assert main(["reshard", str(tmp_path / "two.pt"), str(tmp_path / "one.pt"), "--portable", "--json", str(figures)]) == 0
    assert "2 -> 1 files, 4 experts" in capsys.readouterr().out
    assert json.loads(figures.read_text())["optimizer_state"] is True
    assert_identical(read_checkpoint(str(trained)), read_checkpoint(str(tmp_path / "one.pt")))
    hypotheses = [runs.generate(corpus, path, tmp_path / name) for path, name in ((trained, "a"), (tmp_path / "one.pt", "b"))]
    assert hypotheses[0] == hypotheses[1]


@pytest.mark.parametrize(
    "size, change, sentence",
    [
        (3, {}, "--expert-parallel-size 3 does not divide the 8 experts"),
        (0, {}, "--expert-parallel-size 0 does not divide"),
        (2, {"model": {"embed": torch.ones(2)}, "extra_state": {}}, "has no experts"),
        (2, {"expert_parallel": None}, "does not say which optimizer state belongs to experts"),
        (2, {"expert_parallel": {"size": 2}}, "is one of 2 files; name the checkpoint without its -rank-N"),
    ],
)
def test_an_impossible_conversion_gives_a_one_line_error(tmp_path, size, change, sentence):
    torch.save({**made_up(), **change}, tmp_path / "in.pt")
    with pytest.raises(SystemExit, match=sentence) as error:
        main(["reshard", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--expert-parallel-size", str(size)])
    assert error.value.code and not list(Path(tmp_path).glob("out*"))


def test_a_missing_input_and_an_overwritten_input_are_named(tmp_path):
    with pytest.raises(SystemExit, match="gone.pt does not exist, nor does .*gone-rank-0.pt"):
        main(["reshard", str(tmp_path / "gone.pt"), str(tmp_path / "out.pt"), "--portable"])
    torch.save(made_up(), tmp_path / "in.pt")
    with pytest.raises(SystemExit, match="in.pt would be overwritten"):
        main(["reshard", str(tmp_path / "in.pt"), str(tmp_path / "in.pt"), "--portable"])


def test_an_unwritable_output_is_named_and_leaves_no_files(tmp_path):
    source, pipe = tmp_path / "in.pt", tmp_path / "pipe.pt"
    torch.save(made_up(), source)
    os.mkfifo(pipe)
    (tmp_path / "file").write_text("the user's")
    os.link(source, tmp_path / "same.pt")
    for out, sentence in (
        ("", "the name of the checkpoint to write is empty; give a path"),
        ("/dev/full", "/dev/full is a pipe or device, not a file"),
        (pipe, "pipe.pt is a pipe or device"),
        (tmp_path, "is a folder, not a file"),
        (tmp_path / "file" / "out.pt", "file/out.pt cannot be written .File exists"),
        ("/proc/out.pt", "/proc/out.pt cannot be written .No such file"),
        ("/proc/sys/in/out.pt", "out.pt cannot be written .No such file"),
        (tmp_path / ("x" * 300), "x cannot be written .File name too long"),
        (tmp_path / "same.pt", "same.pt would be overwritten, but it is an input; choose another OUT"),
    ):
        with pytest.raises(SystemExit, match=sentence) as error:
            main(["reshard", str(source), str(out), "--portable"])
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in.pt", "pipe.pt", "same.pt"]
    assert (tmp_path / "file").read_text() == "the user's" and pipe.is_fifo()


def test_a_pipe_among_the_inputs_is_refused_without_blocking(tmp_path):
    torch.save(made_up(), tmp_path / "in.pt")
    reshard(str(tmp_path / "in.pt"), str(tmp_path / "two.pt"), 2)
    (tmp_path / "two-rank-1.pt").unlink()
    os.mkfifo(tmp_path / "two-rank-1.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, pipe in (("two.pt", "two-rank-1.pt"), ("pipe.pt", "pipe.pt")):
        with pytest.raises(SystemExit, match=f"{pipe} is a pipe or device; name a checkpoint file"):
            main(["reshard", str(tmp_path / name), str(tmp_path / "out.pt"), "--portable"])


def test_old_files_are_kept_until_all_new_ones_are_on_disk(tmp_path):
    torch.save(made_up(), tmp_path / "in.pt")
    reshard(str(tmp_path / "in.pt"), str(tmp_path / "two.pt"), 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    saved, full = torch.save, OSError(28, "No space left on device")

    def one_and_no_more(obj, path):
        if obj["expert_parallel"]["index"] == 1:
            raise full
        saved(obj, path)

    with patch("torch.save", one_and_no_more), patch("time.sleep"):
        with pytest.raises(SystemExit, match="two-rank-1.pt cannot be written .No space left on device"):
            main(["reshard", str(tmp_path / "in.pt"), str(tmp_path / "two.pt"), "--expert-parallel-size", "2"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system has no posix_fallocate")
def test_missing_disk_space_is_reported_before_writing(tmp_path):
    torch.save(made_up(), tmp_path / "in.pt")
    reshard(str(tmp_path / "in.pt"), str(tmp_path / "two.pt"), 2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with patch("os.posix_fallocate", side_effect=OSError(28, "No space left on device")):
        with pytest.raises(SystemExit, match="out.pt cannot be written .No space left on device; .* MiB are free there"):
            main(["reshard", str(tmp_path / "two.pt"), str(tmp_path / "out.pt"), "--portable"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with patch("os.posix_fallocate", side_effect=OSError(95, "Operation not supported")):  # a file system without it
        assert main(["reshard", str(tmp_path / "two.pt"), str(tmp_path / "out.pt"), "--portable"]) == 0


def test_the_json_report_must_not_overwrite_a_file_of_the_command(tmp_path):
    torch.save(made_up(), tmp_path / "in.pt")
    for figures, sentence in (
        ("in.pt", "--json .*in.pt would overwrite a file of this command"),
        ("out.pt", "--json .*out.pt would overwrite a file of this command"),
        ("gone/figures.json", "--json .*figures.json cannot be written"),
        (".", "--json .* cannot be written"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            main(["reshard", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--portable", "--json", f"{tmp_path}/{figures}"])
        assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


ODD = {
    "a model of text": {"model": {"layer.experts.weight_in": "text"}},
    "experts without a dimension": {"model": {"layer.experts.weight_in": torch.tensor(1.0)}},
    "an average of text": {"extra_state": {"ema": "text"}},
    "optimizer states without a name": {"last_optimizer_state": {"param_groups": []}},
}


@pytest.mark.parametrize("kind", ODD)
def test_a_checkpoint_with_invalid_entries_gives_a_one_line_error(kind, tmp_path):
    torch.save({**made_up(), **ODD[kind]}, tmp_path / "in.pt")
    with pytest.raises(SystemExit, match="in.pt is .*; use another file") as error:
        main(["reshard", str(tmp_path / "in.pt"), str(tmp_path / "out.pt"), "--expert-parallel-size", "2"])
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["in.pt"]
