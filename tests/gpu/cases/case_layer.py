"""One layer on fake CUDA tensors: every router, precision and mode runs, and the grouped path never waits for the device."""

import contextlib
import itertools
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda.watching import Watch, autocast
from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.gates import GATES, gate_options
from fairseq_sparsemixer.moe.kernels import choice
from fairseq_sparsemixer.moe.parallel import ExpertGroup, Nodes

S, M, H, E = 64, 16, 32, 8
ROUTERS = sorted(set(GATES) - {"base"})  # base's solvers read the scores on the host
PRECISIONS = ("float32", "float16", "bfloat16", "autocast")
WAITS = {"sinkhorn": 1}  # waits in training: one every ten iterations, to check convergence
ROWS_UNKNOWN = {"expert_threshold", "remoe"}  # tokens have different numbers of experts: one wait, to read the number of rows

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
both_paths = pytest.mark.parametrize("fused", [False, True], ids=["PyTorch", "fused"])


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *arguments: (9, 0))


def on_gpu(router, precision="bfloat16", experts=E, **options):
    torch.set_default_dtype(dtype_of(precision))  # fake parameters cannot be converted later
    try:
        with torch.device("cuda"):
            return build_moe_layer(router, M, H, experts, **options)
    finally:
        torch.set_default_dtype(torch.float32)


def dtype_of(precision):
    return torch.float32 if precision == "autocast" else getattr(torch, precision)


def tokens(precision="bfloat16", count=S):
    return torch.randn(count, M, device="cuda", dtype=dtype_of(precision), requires_grad=True)


def in_precision(precision):
    return autocast(torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


def run(layer, x, precision, watch, padding=None):
    with watch, in_precision(precision):
        output = layer(x, padding)
        loss = output.sum() + sum(layer.routing.aux_losses.values())
    with watch:
        loss.backward()
    return output


def balancing(router):
    """The combinations of capacity and selection bias that a router supports."""
    options = [{}]
    if "capacity_factor" in gate_options(router):
        options.append({"capacity_factor": 1.25})
    if "capacity_policy" in gate_options(router):
        options += [{"capacity_factor": 1.25, "capacity_policy": policy} for policy in ("probability", "batch")]
    if "bias_update_rate" in gate_options(router):
        options.append({"bias_update_rate": 1e-3})
    return options


CASES = [(router, options) for router in ROUTERS for options in balancing(router)]


@pytest.mark.parametrize(
    "router, options", CASES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "plain"
)
@pytest.mark.parametrize("precision", PRECISIONS)
@both_paths
def test_the_layer_runs_in_every_precision_and_mode(router, options, precision, fused):
    if fused and precision in ("float32", "bfloat16"):
        pytest.skip("float32 is not fused, and bfloat16 takes the path of autocast")
    for training, padded in itertools.product((True, False), (True, False)):
        with FakeTensorMode(allow_non_fake_inputs=False), choice.forced(fused):
            layer, x = on_gpu(router, precision, **options).train(training), tokens(precision)
            padding = torch.zeros(S, dtype=torch.bool, device="cuda") if padded else None
            watch = Watch(itertools.cycle([S // E]).__next__)
            output = run(layer, x, precision, watch, padding)
        assert output.device.type == "cuda" and x.grad.dtype == x.dtype
        assert output.dtype == (torch.bfloat16 if precision == "autocast" else x.dtype)
        assert layer.experts.weight_in.grad.dtype == layer.experts.weight_in.dtype
        if fused or precision in ("bfloat16", "autocast") and hasattr(F, "grouped_mm"):
            allowed = (WAITS.get(router, 0) if training else 0) + int(router in ROWS_UNKNOWN)
            assert len(watch.waits) <= allowed, watch.waits


@needs_grouped_mm
@both_paths
@pytest.mark.parametrize("router", ROUTERS)
def test_no_more_rows_are_computed_than_routed(router, fused):
    with FakeTensorMode(), choice.forced(fused):
        layer, x, watch = on_gpu(router, experts=16), tokens(), Watch()
        run(layer, x, "bfloat16", watch)
        index = layer.routing.expert_index
    assert watch.rows <= max(layer.routing.max_routed or index.numel(), S)


LAUNCHES = {  # per layer, forward and backward; justify any increase
    "hash": 56,
    "round_robin": 56,
    "expert_choice": 102,
    "switch": 103,
    "dense_st": 108,
    "topk": 119,
    "remoe": 126,
    "expert_threshold": 119,
    "default_moe": 118,
    "sparsemixer": 134,
    "gshard": 159,
    "sparsemixer_v2": 174,
    "noisy_topk": 190,
    "sinkhorn": 228,  # ten iterations, after which it looks whether they settled
}


FUSED_LAUNCHES = {  # the same with the fused kernels
    "hash": 27,
    "round_robin": 29,
    "sparsemixer_v2": 31,
    "switch": 31,
    "sparsemixer": 32,
    "expert_choice": 63,
    "dense_st": 72,
    "expert_threshold": 79,
    "topk": 83,
    "remoe": 87,
    "default_moe": 92,
    "gshard": 122,
    "noisy_topk": 160,
    "sinkhorn": 197,
}


@needs_grouped_mm
@both_paths
@pytest.mark.parametrize("router", ROUTERS)
def test_kernel_launches_stay_within_budget(router, fused):
    with FakeTensorMode(), choice.forced(fused):
        layer, x, watch = on_gpu(router), tokens(), Watch()
        run(layer, x, "bfloat16", watch)
    print(router, sum(watch.launches.values()), watch.launches.most_common(12))
    assert sum(watch.launches.values()) <= (FUSED_LAUNCHES if fused else LAUNCHES)[router]


@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("router, k", [("switch", 1), ("sparsemixer", 1), ("sparsemixer_v2", 2)])
def test_the_fused_path_launches_35_kernels_at_most_on_every_gpu_and_in_half_precision(
    router, k, precision, capability, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *arguments: (capability, 0))
    with FakeTensorMode(), choice.forced(True):
        layer, x, watch = on_gpu(router, precision, experts=64), tokens(precision), Watch()
        run(layer, x, precision, watch)
    by_torch = precision == "bfloat16" and capability >= 9 and hasattr(F, "grouped_mm")
    assert watch.launches["_grouped_mm" if by_torch else "grouped_product"] >= 4
    assert sum(watch.launches.values()) <= 35 and not watch.waits


@needs_grouped_mm
@both_paths
def test_rows_are_sent_in_the_precision_of_the_computation(fused, monkeypatch):
    sent = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda out, rows, *args, **kwargs: (sent.append(rows.dtype), Mock())[1])
    with FakeTensorMode(), choice.forced(fused):
        layer, x = on_gpu("switch", "autocast"), tokens("autocast")
        layer.shard_experts(ExpertGroup(8, 0, None, None, 8, True))
        answers = iter([8] * 16 + [64] * 9)
        with Watch(lambda: next(answers)), autocast(torch.bfloat16):
            layer(x)
    assert [dtype for dtype in sent if dtype.is_floating_point] == [torch.bfloat16] * 2


@needs_grouped_mm
@pytest.mark.parametrize(
    "router, experts, nodes, launches",
    [
        ("sparsemixer", 8, None, 41),
        ("sparsemixer", 64, None, 45),
        ("remoe", 64, None, 100),
        ("sparsemixer", 8, Nodes(2, None, None), 62),
    ],
)
def test_sharded_experts_wait_once_and_copy_received_rows_only_where_needed(router, experts, nodes, launches, monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", lambda *args, **kwargs: Mock())
    with FakeTensorMode(), choice.forced(True):
        layer, x = on_gpu(router, experts=experts), tokens()
        layer.shard_experts(ExpertGroup(8, 0, None, None, 8, True, nodes=nodes))
        watch = Watch(lambda: S // experts)  # to each expert
        run(layer, x, "bfloat16", watch)
    print(router, sum(watch.launches.values()), watch.launches.most_common(40), watch.waits)
    waits = [name for name, repeated in itertools.groupby(watch.waits)]  # a list of numbers is read at once
    assert waits == ["copy from cuda to cpu"]
    copies = watch.launches["cat"] - (1 if nodes is None else 2)  # those of the counts
    several = experts > 8 or nodes is not None  # on a rank, or steps of the exchange
    assert copies == (4 if several else 0)  # rows in and outputs back, forward and backward
    assert sum(watch.launches.values()) <= launches
