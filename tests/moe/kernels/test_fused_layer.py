"""The whole layer by the fused path, compared with the PyTorch path. On a CPU, the custom ops run their formulas."""

import copy
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.experts import KNOWN, Experts
from fairseq_sparsemixer.moe.gates import GATES, sparsemixer, sparsemixer_v2
from fairseq_sparsemixer.moe.gates.sparsemixer import SamplingNoise, SparseMixerGate
from fairseq_sparsemixer.moe.gates.sparsemixer_v2 import SparseMixerV2Gate
from fairseq_sparsemixer.moe.gates.switch import SwitchGate
from fairseq_sparsemixer.moe.kernels import choice, functions
from fairseq_sparsemixer.moe.layer import MoELayer

TOKENS, M, H, E = 20, 16, 24, 4
FUSED_ROUTERS = {"switch", "sparsemixer", "sparsemixer_v2"}


@pytest.fixture
def same_noise(monkeypatch):
    """Both paths of the SparseMixers draw the same numbers."""

    def draw(logits, k):
        shape = logits.size(0), k, logits.size(1) + 1
        return torch.arange(torch.Size(shape).numel(), dtype=logits.dtype).sin().view(shape) * 0.45 + 0.5

    def as_gumbel(logits, k):
        draws = draw(logits, k).unbind(1)
        return [SamplingNoise(-(-uniform[:, :-1].log()).log(), uniform[:, -1]) for uniform in draws]

    monkeypatch.setattr(sparsemixer, "draw_uniform", draw)
    monkeypatch.setattr(sparsemixer_v2, "draw_uniform", draw)
    monkeypatch.setattr(SparseMixerGate, "draw_noise", lambda gate, logits: as_gumbel(logits, 1)[0] if gate.training else None)
    monkeypatch.setattr(
        SparseMixerV2Gate, "draw_noise", lambda gate, logits: as_gumbel(logits, gate.top_k) if gate.training else None
    )


def step(layer, x, padding, fused, run=None):
    """Output, losses and all gradients of a copy of the layer."""
    layer, x = copy.deepcopy(layer), x.clone().requires_grad_()
    torch.manual_seed(7)
    with choice.forced(fused):
        out = (run or (lambda own, *inputs: own(*inputs)))(layer, x, padding, torch.arange(TOKENS))
        losses = layer.routing.aux_losses
        (out.square().sum() + sum(losses.values())).backward()
    assert layer.routing.tokens is None
    return [out, x.grad, *losses.values(), *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", sorted(GATES))
def test_every_router_gives_the_same_outputs_and_gradients_on_both_paths(router, training, padded, same_noise):
    layer = build_moe_layer(router, M, H, E, num_shared_experts=1).train(training)
    x, padding = torch.randn(TOKENS, M), torch.rand(TOKENS) < 0.3 if padded else None
    torch.testing.assert_close(*(step(layer, x, padding, fused) for fused in (True, False)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {"capacity_factor": 0.5}, {"bias_update_rate": 0.1}, {"router_bias": True}, {"gradient_estimator": "inf"},
    {"estimator_at_argmax": True}, {"jitter_eps": 0.0}, {"sampled": False}, {"scaled": False},
], ids=str)  # fmt: skip
def test_the_options_of_a_router_work_on_the_fused_path(options, same_noise):
    layer, x = build_moe_layer("sparsemixer", M, H, E, **options), torch.randn(TOKENS, M)
    if "sampled" in options:
        layer.gate.draw_noise = lambda logits: SamplingNoise(
            torch.zeros_like(logits), sparsemixer.draw_uniform(logits, 1)[:, 0, -1]
        )
    torch.testing.assert_close(*(step(layer, x, None, fused) for fused in (True, False)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*KNOWN, "unknown"])
def test_activations_without_a_kernel_take_the_other_path(name):
    activation = torch.tanh if name == "unknown" else name
    layer, x = build_moe_layer("switch", M, H, E, activation), torch.randn(TOKENS, M)
    with choice.forced(True):
        assert layer.experts.is_fused(x) == (name != "unknown")
    torch.testing.assert_close(*(step(layer, x, None, fused) for fused in (True, False)), rtol=1e-4, atol=1e-5)


def test_functions_given_by_value_have_their_kernel():
    assert Experts(2, 4, 4, torch.nn.functional.gelu).activation_name == "gelu"
    assert Experts(2, 4, 4, torch.nn.functional.silu).activation_name == "silu"


def test_activation_checkpointing_recomputes_the_same(same_noise):
    layer, x = build_moe_layer("sparsemixer", M, H, E, dropout=0.25), torch.randn(TOKENS, M)
    again = step(layer, x, None, True, lambda own, *inputs: checkpoint(own, *inputs, use_reentrant=False))
    torch.testing.assert_close(again, step(layer, x, None, True))


def test_a_layer_can_be_used_twice_before_the_backward(same_noise):
    layer, x = build_moe_layer("sparsemixer_v2", M, H, E), torch.randn(TOKENS, M)

    def twice(own, x, padding, ids):
        return own(own(x, padding, ids), padding, ids)

    torch.testing.assert_close(*(step(layer, x, None, fused, twice) for fused in (True, False)), rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_precision_and_returns_gradients_in_that_of_the_parameters():
    layer, x = build_moe_layer("switch", M, H, E).eval(), torch.randn(TOKENS, M, requires_grad=True)
    with choice.forced(True), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and x.grad.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


@pytest.mark.parametrize("part", ["experts", "gate"])
@pytest.mark.parametrize("router", sorted(FUSED_ROUTERS))
def test_a_nan_in_a_layer_appears_in_every_output(router, part):
    layer = build_moe_layer(router, M, H, E)
    for parameter in getattr(layer, part).parameters():
        parameter.data.fill_(torch.nan)
    with choice.forced(True):
        out = layer(torch.randn(12, M), torch.arange(12) >= 10)
    assert out[:10].isnan().all() and not out[10:].any()


@pytest.mark.parametrize("router", ["switch", "sparsemixer", "sparsemixer_v2", "gshard", "topk"])
def test_no_tokens_give_no_output_and_zero_gradients(router):
    layer = build_moe_layer(router, M, H, E)
    with choice.forced(True):
        out = layer(torch.randn(0, M, requires_grad=True))
        (out.sum() + sum(layer.routing.aux_losses.values())).backward()
    assert out.shape == (0, M) and not layer.experts.weight_in.grad.any()


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["switch", "sparsemixer", "sparsemixer_v2", "noisy_topk", "hash"])
def test_the_fused_path_compiles_without_a_graph_break(router, training, same_noise):
    layer, x = build_moe_layer(router, M, H, E).train(training), torch.randn(TOKENS, M)
    torch._dynamo.reset()

    def compiled(own, *inputs):
        return torch.compile(own, backend="aot_eager", fullgraph=True)(*inputs)

    torch.testing.assert_close(step(layer, x, None, True, compiled), step(layer, x, None, True))


class ColdGate(SwitchGate):
    """A gate of a user's own, with other logits."""

    def logits(self, tokens):
        return super().logits(tokens) * 5


def test_logits_of_a_gates_own_are_used_on_both_paths():
    layer = MoELayer(ColdGate(M, E, jitter_eps=0.0), Experts(E, M, H))
    x = torch.randn(TOKENS, M)
    torch.testing.assert_close(*(step(layer, x, None, fused) for fused in (True, False)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_importing_and_running_the_layer_on_a_cpu_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import torch; from fairseq_sparsemixer import build_moe_layer as build;"
    code += "build('sparsemixer', 8, 8, 2)(torch.randn(4, 8)).sum().backward()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_order_of_pairs_is_sorted_once_per_dispatch(monkeypatch):
    sorted_times, sort = [], functions.sort
    monkeypatch.setattr(functions, "sort", lambda *arguments: sorted_times.append(1) or sort(*arguments))
    with choice.forced(True):
        build_moe_layer("switch", M, H, E)(torch.randn(TOKENS, M)).sum().backward()
    assert len(sorted_times) == 1
