"""oneDNN is used only if its product agrees with F.linear; a missing, failing or wrong one is not used."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fairseq_sparsemixer.moe import onednn
from fairseq_sparsemixer.moe.experts import Experts


@pytest.fixture(autouse=True)
def unchecked():
    """Clear the cached check, as in a new process."""
    onednn.onednn_is_right.cache_clear()
    yield
    onednn.onednn_is_right.cache_clear()


def right(rows, weight, bias, *options):
    """rows @ weight.T + bias, in float64."""
    product = rows.double() @ weight.double().t()
    return (product if bias is None else product + bias).float()


def fails(*arguments):
    raise RuntimeError("this product cannot run")


FAULTY = {
    "missing": SimpleNamespace(),
    "raises": SimpleNamespace(_linear_pointwise=fails),
    "takes other arguments": SimpleNamespace(_linear_pointwise=lambda rows, weight: rows),
    "is inexact": SimpleNamespace(_linear_pointwise=lambda *layer: right(*layer) * 1.001),
    "forgets the bias": SimpleNamespace(_linear_pointwise=lambda rows, weight, bias, *options: right(rows, weight, None)),
    "misreads a transposed weight": SimpleNamespace(
        _linear_pointwise=lambda rows, weight, *more: right(rows, weight.t().reshape(weight.shape), *more)
    ),
    "gives NaN": SimpleNamespace(_linear_pointwise=lambda *layer: right(*layer) * torch.nan),
    "has another shape": SimpleNamespace(_linear_pointwise=lambda *layer: right(*layer)[:-1]),
}


def expected(experts, rows, counts):
    """The output of relu experts by the formula in float64, differentiable in parameters and rows."""
    outputs = []
    for expert, own in enumerate(rows.double().split(counts)):
        w_in, b_in = experts.weight_in[expert].double(), experts.bias_in[expert].double()
        w_out, b_out = experts.weight_out[expert].double(), experts.bias_out[expert].double()
        outputs.append((own @ w_in + b_in).relu() @ w_out + b_out)
    return torch.cat(outputs).float()


@pytest.mark.parametrize("fault", FAULTY)
def test_experts_do_not_use_a_faulty_product(fault, monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", FAULTY[fault])
    experts, rows, counts = Experts(3, 8, 16), torch.randn(80, 8, requires_grad=True), [40, 0, 40]
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [rows, *experts.parameters()]
    out = experts(rows, counts)
    reference = expected(experts, rows, counts)
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-4)
    upstream = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(reference, inputs, upstream), rtol=1e-5, atol=1e-3
    )
    with torch.no_grad():
        torch.testing.assert_close(experts(rows, counts), reference, rtol=1e-5, atol=1e-4)
    assert not onednn.takes_onednn(rows)


def test_a_correct_product_is_used_and_checked_once(monkeypatch):
    calls = []

    def counted(*layer):
        calls.append(layer)
        return right(*layer)

    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=counted))
    rows, weight = torch.randn(3, 2), torch.randn(4, 2)
    torch.testing.assert_close(onednn.linear(rows, weight), rows @ weight.t())
    first = len(calls)
    onednn.linear(rows, weight)
    assert len(calls) == first + 1


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32)])
def test_other_dtypes_and_devices_use_linear_without_a_check(device, dtype, monkeypatch):
    monkeypatch.setattr(onednn, "onednn_is_right", fails)
    assert not onednn.takes_onednn(torch.empty(3, 2, device=device, dtype=dtype))


def test_the_check_ignores_the_callers_modes_and_keeps_the_random_state(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_linear_pointwise=right))
    state = torch.random.get_rng_state()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert onednn.onednn_is_right()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.compile
def test_compiled_experts_need_no_check(monkeypatch):
    monkeypatch.setattr(onednn, "_agrees_with_linear", fails)
    experts, rows, counts = Experts(3, 8, 16), torch.randn(80, 8), [40, 0, 40]
    torch._dynamo.reset()
    compiled = torch.compile(experts, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows, counts), expected(experts, rows, counts), rtol=1e-5, atol=1e-5)
    assert onednn.onednn_is_right.cache_info().currsize == 0
