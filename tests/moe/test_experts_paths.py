"""All implementations of the experts, and of dispatching to them, give the same results."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe import grouped, onednn
from fairseq_sparsemixer.moe.dispatch import dispatch_locally
from fairseq_sparsemixer.moe.experts import ACTIVATIONS, GATED_ACTIVATIONS, Experts
from fairseq_sparsemixer.moe.feed_forward import Weights, feed_forward_by_expert, groups_of
from fairseq_sparsemixer.moe.gates import GATES
from fairseq_sparsemixer.moe.grouped import feed_forward_grouped
from fairseq_sparsemixer.moe.kernels import choice, functions
from fairseq_sparsemixer.moe.kernels.choice import can_group, leaves_garbage

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
ALL_ACTIVATIONS = {**ACTIVATIONS, **GATED_ACTIVATIONS}


def make_weights(experts, model_dim, hidden_dim, gated=False, dtype=torch.float32):
    inner = 2 * hidden_dim if gated else hidden_dim
    shapes = ((experts, model_dim, inner), (experts, inner), (experts, hidden_dim, model_dim), (experts, model_dim))
    return Weights(*(torch.randn(*shape, dtype=dtype).div_(4).requires_grad_() for shape in shapes))


def run(path, rows, weights, counts, activation, upstream):
    """Output and all gradients of one implementation."""
    out = path(rows, weights, counts, activation)
    return [out, *torch.autograd.grad(out, [rows, *weights], upstream)]


@pytest.mark.parametrize("name", ALL_ACTIVATIONS)
def test_gradients_match_finite_differences(name):
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weights = make_weights(3, 2, 3, name in GATED_ACTIVATIONS, torch.float64)
    activation = ALL_ACTIVATIONS[name]
    assert torch.autograd.gradcheck(
        lambda rows, *weights: feed_forward_by_expert(rows, Weights(*weights), [2, 0, 3], activation), (rows, *weights)
    )


@pytest.mark.parametrize("name", ALL_ACTIVATIONS)
def test_onednn_agrees_with_linear(name, monkeypatch):
    rows, upstream = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8)
    weights = make_weights(4, 8, 16, name in GATED_ACTIVATIONS)
    with_onednn = run(feed_forward_by_expert, rows, weights, [4, 0, 1, 4], ALL_ACTIVATIONS[name], upstream)
    monkeypatch.setattr(onednn, "onednn_is_right", lambda: False)
    without = run(feed_forward_by_expert, rows, weights, [4, 0, 1, 4], ALL_ACTIVATIONS[name], upstream)
    torch.testing.assert_close(with_onednn, without, rtol=1e-5, atol=1e-5)


@needs_grouped_mm
@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=4), tail=st.integers(0, 3),
       name=st.sampled_from(list(ALL_ACTIVATIONS)))  # fmt: skip
def test_the_grouped_product_agrees_with_the_loop_and_zeroes_the_remaining_rows(counts, tail, name):
    weights = make_weights(len(counts), 8, 16, name in GATED_ACTIVATIONS)
    used = sum(counts)
    rows, upstream = torch.randn(used + tail, 8, requires_grad=True), torch.randn(used + tail, 8)
    out, grad_rows, *grads = run(feed_forward_grouped, rows, weights, torch.tensor(counts), ALL_ACTIVATIONS[name], upstream)
    used_rows = rows.detach()[:used].requires_grad_()
    loop = run(feed_forward_by_expert, used_rows, weights, counts, ALL_ACTIVATIONS[name], upstream[:used])
    torch.testing.assert_close([out[:used], grad_rows[:used], *grads], loop, rtol=1e-5, atol=1e-5)
    assert not out[used:].any() and not grad_rows[used:].any()


@needs_grouped_mm
@pytest.mark.parametrize("router", ["switch", "sparsemixer", "sparsemixer_v2", "default_moe", "remoe", "expert_threshold"])
def test_counts_on_the_device_give_the_same_result_as_counts_on_the_host(router, monkeypatch):
    on_host = build_moe_layer(router, 8, 16, 4)
    on_device = copy.deepcopy(on_host)
    monkeypatch.setattr(on_device.experts, "takes_device_counts", lambda rows: True)
    x, padding = torch.randn(3, 7, 8), torch.rand(3, 7) < 0.3
    outputs = []
    for layer in (on_host, on_device):
        torch.manual_seed(3)
        outputs.append(layer(x, padding))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(on_device.parameters(), on_host.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@needs_grouped_mm
@pytest.mark.parametrize("router", ["switch", "sparsemixer", "sparsemixer_v2"])
def test_the_device_path_never_synchronises_with_the_host(router):
    """Runs on tensors without data, so reading a count would raise."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        layer, tokens = build_moe_layer(router, 8, 16, 4), torch.randn(10, 8)
        routing = layer.gate(tokens, torch.zeros(10, dtype=torch.bool))
        out = dispatch_locally(tokens, routing, layer.experts, counts_on_device=True)
        out.sum().backward()
    assert out.shape == (10, 8) and layer.experts.weight_in.grad is not None


@pytest.mark.compile
@needs_grouped_mm
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["switch", "sparsemixer", "sparsemixer_v2", "noisy_topk", "gshard", "hash", "dense_st"])
def test_gate_and_experts_compile_without_a_graph_break(router, training, monkeypatch):
    layer = build_moe_layer(router, 8, 16, 4).train(training).bfloat16()
    monkeypatch.setattr(layer.experts, "takes_device_counts", lambda rows: True)
    x, padding, ids = torch.randn(10, 8).bfloat16().requires_grad_(), torch.rand(10) < 0.3, torch.arange(10)
    torch._dynamo.reset()  # its recompilation limit counts over the whole process
    outputs, gradients = [], []
    for run in (layer, torch.compile(layer, backend="eager", fullgraph=True)):
        torch.manual_seed(1)  # the same noise
        layer.zero_grad()
        outputs.append(run(x, padding, token_ids=ids))
        (outputs[-1].square().sum() + sum(layer.routing.aux_losses.values())).backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_the_loops_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask():
    for activation in (F.relu, torch.tanh):  # relu's result is kept, tanh is recomputed
        rows = torch.ones(4000, 2, dtype=torch.float64, requires_grad=True)
        weights = Weights(*(torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True) for shape in
                            ((1, 2, 3), (1, 3), (1, 3, 2), (1, 2))))  # fmt: skip
        kept = feed_forward_by_expert(rows, weights, [4000], activation)
        dropped = feed_forward_by_expert(rows, weights, [4000], activation, dropout=0.25)
        torch.testing.assert_close(dropped.mean(), kept.mean(), rtol=0.03, atol=0)
        hidden = activation(torch.tensor(1.5, dtype=torch.float64)).item()
        survivors = ((dropped[:, 0] - 0.5) / (0.5 * hidden / 0.75)).round()  # surviving hidden units of 3, per row
        assert set(survivors.tolist()) == {0, 1, 2, 3}
        (grad,) = torch.autograd.grad(dropped[:, 0].sum(), weights.bias_out, retain_graph=True)
        assert grad[0, 0] == 4000
        (grad,) = torch.autograd.grad(dropped[:, 0].sum(), rows)
        slope = 1 if activation is F.relu else 1 - hidden**2
        torch.testing.assert_close(grad[:, 0], survivors.detach() * 0.5 * 0.5 * slope / 0.75)


def test_the_output_without_gradients_is_the_same():
    experts = Experts(3, 8, 16, "gelu")
    rows = torch.randn(6, 8)
    with torch.no_grad():
        plain = experts(rows, [1, 0, 5])
    torch.testing.assert_close(plain, experts(rows, [1, 0, 5]))


def test_activations_with_parameters_and_invalid_dropout_are_refused():
    with pytest.raises(ValueError, match="has parameters, which experts do not train"):
        Experts(2, 3, 4, activation=torch.nn.PReLU())
    with pytest.raises(ValueError, match=r"dropout=1.5 must lie in \[0, 1\]"):
        Experts(2, 3, 4, dropout=1.5)
    with pytest.raises(ValueError, match=r"dropout=-0.5 must lie in \[0, 1\]"):
        Experts(2, 3, 4, dropout=-0.5)


def test_rounded_row_counts_have_few_sizes_and_little_waste():
    sizes = {count: groups_of([count, 10**6], rounded=True)[0].rows.stop for count in range(1, 4097)}
    assert len(set(sizes.values())) <= 31 + 16 * 7 + 1
    assert all(count <= size <= count * 17 / 16 for count, size in sizes.items())


def test_surplus_rows_affect_neither_outputs_nor_gradients():
    experts = Experts(2, 8, 16)
    rows = torch.randn(80, 8)
    rows[65:] = float("nan")  # the second expert's rows; three of them are surplus rows of the first expert's product
    out = experts(rows, [65, 15])
    out[:65].sum().backward()
    assert out[:65].isfinite().all()
    assert all(parameter.grad[0].isfinite().all() for parameter in experts.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL_ACTIVATIONS)
@pytest.mark.parametrize("parameter", ["weight_in", "bias_in", "weight_out", "bias_out"])
def test_a_nan_in_an_expert_appears_in_its_output_and_no_others(parameter, name, dtype, training):
    """oneDNN's relu, fused with a product, would turn a NaN into 0."""
    experts = Experts(3, 8, 16, name, dropout=0.5 if training else 0.0).to(dtype).train(training)
    getattr(experts, parameter).data[1] = torch.nan
    out = experts(torch.randn(80, 8, dtype=dtype), [5, 70, 5])
    assert out[5:75].isnan().all() and out[:5].isfinite().all() and out[75:].isfinite().all()
    with torch.no_grad():
        assert experts.eval()(torch.randn(80, 8, dtype=dtype), [5, 70, 5])[5:75].isnan().all()
    out.float().sum().backward()
    assert experts.weight_in.grad[0].isfinite().all() and experts.weight_out.grad[2].isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", sorted(set(GATES) - {"expert_choice"}))
@pytest.mark.parametrize("part", ["experts", "shared_experts", "gate"])
def test_a_nan_in_a_layer_appears_in_every_output(router, part, training):
    layer = build_moe_layer(router, 8, 16, 4, num_shared_experts=1).train(training)
    if part == "gate" and router in ("hash", "round_robin"):
        pytest.skip("these gates do not use their parameters")
    for parameter in getattr(layer, part).parameters():
        parameter.data.fill_(torch.nan)
    out = layer(torch.randn(12, 8), torch.arange(12) >= 10)
    if router == "gshard" and training:  # dropped tokens run no routed expert
        assert out[:10].isnan().any()
    elif router in ("expert_threshold", "remoe") and part == "experts":  # a token may get no expert
        assert torch.equal(out[:10].isnan().all(1), ~layer.routing.skipped[:10].all(1))
    else:
        assert out[:10].isnan().all()
    assert not out[10:].any()


@pytest.mark.parametrize("device, dtype, sizes, capability, takes", [
    ("cuda", torch.bfloat16, (64, 256), (8, 0), False),
    ("cuda", torch.bfloat16, (64, 256), (8, 9), False),
    ("cuda", torch.bfloat16, (64, 256), (9, 0), True),
    ("cuda", torch.bfloat16, (64, 256), (10, 0), True),
    ("cuda", torch.bfloat16, (64, 256), (12, 0), False),
    ("cuda", torch.bfloat16, (64, 256), (7, 5), False),
    ("cuda", torch.bfloat16, (8, 24), (9, 0), True),
    ("cuda", torch.bfloat16, (64, 250), (9, 0), False),
    ("cuda", torch.bfloat16, (68, 256), (9, 0), False),
    ("cuda", torch.float32, (64, 256), (9, 0), False),
    ("cpu", torch.bfloat16, (64, 256), (8, 0), False),
])  # fmt: skip
def test_the_grouped_product_is_used_only_on_supported_devices(device, dtype, sizes, capability, takes, monkeypatch):
    monkeypatch.setattr(F, "grouped_mm", None, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_group(torch.device(device), dtype, *sizes) is takes


def hopper_product(a, b, offs):
    """The grouped product as on a GPU: NaN, for uninitialised memory, in the rows after the last group."""
    out = torch._grouped_mm(a, b, offs=offs)
    if a.dim() == 2 and b.dim() == 3:
        out[int(offs[-1]) :] = math.nan
    return out


def blackwell_product(a, b, offs):
    """The same, with NaN also in the weight gradient of a group without rows."""
    out = hopper_product(a, b, offs)
    if b.dim() == 2:
        out[offs.diff(prepend=offs.new_zeros(1)) == 0] = math.nan
    return out


@needs_grouped_mm
@pytest.mark.parametrize("product, cleans", [(hopper_product, False), (blackwell_product, True)])
@pytest.mark.parametrize("name", ALL_ACTIVATIONS)
def test_uninitialised_gpu_memory_affects_no_result(product, cleans, name, monkeypatch):
    counts, tail = [3, 0, 2], 4
    weights = make_weights(3, 8, 16, name in GATED_ACTIVATIONS)
    rows, upstream = torch.randn(5 + tail, 8, requires_grad=True), torch.randn(5 + tail, 8)
    used = rows.detach()[:5].requires_grad_()
    loop = run(feed_forward_by_expert, used, weights, counts, ALL_ACTIVATIONS[name], upstream[:5])
    monkeypatch.setattr(F, "grouped_mm", product)
    monkeypatch.setattr(grouped, "leaves_garbage", lambda device: cleans)
    out, grad_rows, *grads = run(feed_forward_grouped, rows, weights, torch.tensor(counts), ALL_ACTIVATIONS[name], upstream)
    torch.testing.assert_close([out[:5], grad_rows[:5], *grads], loop, rtol=1e-5, atol=1e-5)
    assert not out[5:].any() and not grad_rows[5:].any()


@pytest.mark.parametrize("path", [feed_forward_by_expert, pytest.param(feed_forward_grouped, marks=needs_grouped_mm)])
def test_second_derivatives_are_refused_rather_than_wrong(path):
    rows = torch.randn(5, 8, requires_grad=True)
    counts = [2, 3] if path is feed_forward_by_expert else torch.tensor([2, 3])
    out = path(rows, make_weights(2, 8, 16), counts, torch.tanh)
    (grad,) = torch.autograd.grad(out.square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("path", [feed_forward_by_expert, pytest.param(feed_forward_grouped, marks=needs_grouped_mm)])
def test_freezing_rows_or_weights_does_not_change_the_other_gradients(path):
    rows, weights, upstream = torch.randn(5, 8, requires_grad=True), make_weights(2, 8, 16), torch.randn(5, 8)
    counts = [2, 3] if path is feed_forward_by_expert else torch.tensor([2, 3])
    _, grad_rows, *grads = run(path, rows, weights, counts, F.relu, upstream)
    frozen_rows = path(rows.detach(), weights, counts, F.relu)
    torch.testing.assert_close(torch.autograd.grad(frozen_rows, weights, upstream), tuple(grads))
    frozen_weights = path(rows, Weights(*(weight.detach() for weight in weights)), counts, F.relu)
    torch.testing.assert_close(torch.autograd.grad(frozen_weights, rows, upstream), (grad_rows,))


@pytest.mark.parametrize("activation, inner", [("relu", 24), ("swiglu", 48)])
def test_every_width_of_the_experts_decides_whether_counts_stay_on_the_device(activation, inner, monkeypatch):
    sizes = []
    monkeypatch.setattr(choice, "can_group", lambda device, dtype, *widths: sizes.extend(widths))
    Experts(3, 16, 24, activation).takes_device_counts(torch.zeros(2, 16))
    assert set(sizes) == {16, 24, inner}


@pytest.mark.parametrize("device, capability, leaves", [("cuda", (9, 0), False), ("cuda", (10, 0), True), ("cpu", None, False)])
def test_blackwell_leaves_the_gradients_of_idle_experts_uninitialised(device, capability, leaves, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert leaves_garbage(torch.device(device)) is leaves


@needs_grouped_mm
@pytest.mark.parametrize("fused", [False, True])
def test_no_rows_reach_no_grouped_product_of_torch(fused, monkeypatch):
    product, counts = F.grouped_mm, []

    def counted(one, other, **options):
        counts.append(min(one.shape))
        return product(one, other, **options)

    monkeypatch.setattr(choice, "can_group", lambda *sizes: True)
    monkeypatch.setattr(F, "grouped_mm", counted)
    experts = Experts(3, 8, 16).bfloat16()
    for rows in (torch.randn(2, 8), torch.randn(0, 8)):
        counts.clear()
        rows, received = rows.bfloat16().requires_grad_(), torch.tensor([len(rows), 0, 0])
        with choice.forced(fused):
            experts(rows, received).sum().backward()
            functions.feed_forward(
                rows, *experts.weights(rows)[:3], None, received.cumsum(0, dtype=torch.int32), "relu"
            ).sum().backward()
        assert rows.grad.shape == rows.shape and bool(counts) == bool(len(rows)) and 0 not in counts
        assert bool(experts.weight_in.grad.any()) == bool(len(rows))
        experts.zero_grad()
