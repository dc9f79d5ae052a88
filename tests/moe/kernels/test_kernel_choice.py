"""When the layer uses the fused kernels."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch

from fairseq_sparsemixer.moe.kernels import choice, ops, self_check

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9 on which the kernels are right; returns what changes that."""
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    monkeypatch.setattr(choice, "is_right", lambda device, dtype: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    return monkeypatch


@pytest.mark.parametrize("device, dtype, capability, fused", [
    (CUDA, torch.bfloat16, (8, 0), True), (CUDA, torch.float16, (8, 6), True), (CUDA, torch.float16, (9, 0), True),
    (CUDA, torch.bfloat16, (10, 0), True), (CUDA, torch.bfloat16, (12, 0), True), (CUDA, torch.float16, (7, 5), False),
    (CUDA, torch.float32, (9, 0), False), (CUDA, torch.float64, (9, 0), False), (CPU, torch.bfloat16, (9, 0), False),
])  # fmt: skip
def test_half_precision_on_recent_gpus_is_fused(device, dtype, capability, fused, gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choice.fused(device, dtype) is fused


@pytest.mark.parametrize("missing", ["triton", "check", "cuda", "wish"])
def test_it_is_not_without_triton_or_after_a_failed_check_or_on_rocm_or_if_turned_off(missing, gpu):
    assert choice.fused(CUDA, torch.bfloat16)
    if missing == "triton":
        gpu.setattr(choice, "has_triton", lambda: False)
    elif missing == "check":
        gpu.setattr(choice, "is_right", lambda device, dtype: False)
    elif missing == "wish":
        gpu.setenv("SPARSEMIXER_KERNELS", "0")
    else:
        gpu.setattr(torch.version, "hip", "6.0")
    assert not choice.fused(CUDA, torch.bfloat16)


def test_forcing_lasts_for_a_block():
    with choice.forced(True):
        assert choice.fused(CPU, torch.float32)
        with choice.forced(False):
            assert not choice.fused(CPU, torch.float32)
        assert choice.fused(CPU, torch.float32)
    assert not choice.fused(CPU, torch.float32)


@pytest.fixture
def unchecked():
    choice.is_right.cache_clear()
    yield
    choice.is_right.cache_clear()


def test_kernels_that_fail_their_check_are_named_once_and_not_used(monkeypatch, unchecked):
    calls = []
    monkeypatch.setattr(self_check, "agrees", lambda name, arguments: calls.append(name) or name != "combine_rows")
    with pytest.warns(UserWarning, match=r"not used on cpu in torch.float32.*\(combine_rows differs from its formula\)"):
        assert not choice.is_right(CPU, torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choice.is_right(CPU, torch.float32)
    assert calls.count("combine_rows") == 1


def test_a_kernel_that_does_not_run_is_not_used(monkeypatch, unchecked):
    def broken(name, arguments):
        raise RuntimeError("ptxas")

    monkeypatch.setattr(self_check, "agrees", broken)
    with pytest.warns(UserWarning, match="RuntimeError: ptxas"):
        assert not choice.is_right(CPU, torch.float32)


def test_the_check_passes_where_all_agree_and_leaves_torchs_random_state_alone(unchecked):
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert choice.is_right(CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_difference_is_noticed(monkeypatch):
    name, arguments = next(item for item in self_check.examples(CPU, torch.float32) if item[0] == "tile_sums")
    assert self_check.agrees(name, arguments)
    monkeypatch.setattr(self_check.ops, name, lambda *given: self_check.reference.tile_sums(*given) * 1.001)
    assert not self_check.agrees(name, arguments)


@pytest.mark.parametrize("current, left", [(0, True), (1, False)])
def test_kernels_are_launched_on_the_gpu_of_their_tensors(current, left, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(device))
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), get_device=lambda: 1)
    with ops.on_device_of(tensor) as entered:
        assert entered == (tensor.device if left else None)


def test_every_op_runs_with_its_gpu_as_the_current_device(monkeypatch):
    events, run = [], ops.implementation

    @contextlib.contextmanager
    def recorded(tensor):
        events.append("enter")
        yield
        events.append("leave")

    monkeypatch.setattr(ops, "on_device_of", recorded)
    monkeypatch.setattr(ops, "implementation", lambda name, tensor: events.append(name) or run(name, tensor))
    for name, arguments in self_check.examples(CPU, torch.float32):
        events.clear()
        getattr(ops, name)(*arguments)
        assert events == ["enter", name, "leave"]
