"""The layer benchmark on tiny shapes. The tests check that it measures, not the values."""

import json

import pytest
import torch

from benchmarks import contenders, layer
from benchmarks.contenders import NotRunnable, Shape


@pytest.mark.slow
def test_the_benchmark_writes_measurements_and_reports_what_cannot_run(tmp_path, capsys):
    layer.main(
        ["--tokens", "8", "16", "32", "--experts", "4", "--dims", "8x16", "--top-k", "1", "2", "--rounds", "1"]
        + ["--peer", f"tutel={tmp_path}", "--peer", f"sparsemixer={tmp_path}", "--out", str(tmp_path / "out")]
    )
    result = json.loads((tmp_path / "out" / "layer.json").read_text())
    assert [case["shape"]["tokens"] for case in result["cases"]] == [8, 8, 16, 16, 32, 32]
    top_1, top_2 = result["cases"][:2]
    assert set(top_1["layers"]) == {"dense", "ours"} and set(top_2["layers"]) == {"dense", "ours", "fairscale"}
    assert top_1["layers"]["dense"]["to_dense"] == 1 and "always uses two experts" in top_1["not_run"]["fairscale"]
    assert len(result["growth"]["tokens"]) == 2 and len(result["growth"]["top_k"]) == 3
    assert (tmp_path / "out" / "layer.png").stat().st_size > 1000 and (tmp_path / "out" / "layer.md").is_file()
    assert "sparsemixer: cannot run here" in capsys.readouterr().out


def test_our_layer_synchronises_with_the_host_once():
    torch.manual_seed(0)
    for top_k in (1, 2):
        contender = contenders.ours(Shape(16, 4, top_k, 8, 16))
        from benchmarks.measuring import HostSynchronisations

        with HostSynchronisations() as syncs:
            contender.forward(torch.randn(16, 8))
        assert syncs.count == 1


def test_contenders_have_the_same_active_flops():
    shape = Shape(16, 4, 2, 8, 16)
    assert contenders.dense(shape).module[0].out_features == 2 * 16
    assert contenders.ours(shape).module.gate.top_k == 2
    with pytest.raises(NotRunnable, match="divisible"):
        contenders.fairscale(Shape(18, 4, 2, 8, 16))


def test_an_unknown_peer_is_refused(capsys):
    with pytest.raises(SystemExit):
        layer.main(["--peer", "nobody=/tmp"])
    assert "nobody=/tmp is not NAME=PATH" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced if there is a GPU")
def test_cuda_replacements_are_removed_afterwards():
    before = torch.histc, torch.cuda.Event, torch.cuda.synchronize
    with contenders.cuda_stand_ins():
        torch.cuda.Event(enable_timing=True).record()
        torch.cuda.synchronize()
        assert torch.histc(torch.tensor([1, 2, 2]), bins=2, min=1, max=2).tolist() == [1, 2]
    assert (torch.histc, torch.cuda.Event, torch.cuda.synchronize) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("name", ["tutel", "megablocks", "megatron"])
def test_a_peer_that_needs_a_gpu_says_so(name, tmp_path):
    with pytest.raises(NotRunnable, match="it needs a GPU"):
        contenders.PEERS[name](Shape(8, 2, 1, 4, 4), tmp_path)
