"""The layer as a whole (gate, dispatch, experts, combine), compared with a loop over tokens."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from fairscale.nn.moe import MOELayer
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.gates import GATES

ROUTERS = ["sparsemixer", "switch"]


def token_by_token(layer, tokens):
    """The layer's output for tokens [S, M] by its last routing, computed token by token."""
    routing, experts = layer.routing, layer.experts
    outputs = []
    for s, token in enumerate(tokens):
        total = torch.zeros_like(token)
        for expert, weight in zip(routing.expert_index[s].tolist(), routing.combine_weight[s]):
            hidden = F.relu(token @ experts.weight_in[expert] + experts.bias_in[expert])
            total = total + weight * (hidden @ experts.weight_out[expert] + experts.bias_out[expert])
        if routing.output_scale is not None:
            total = total * routing.output_scale
        if routing.padding_mask is not None and routing.padding_mask[s]:
            total = torch.zeros_like(token)
        outputs.append(total)
    return torch.stack(outputs) if outputs else tokens


@settings(max_examples=30)
@given(tokens=st.integers(0, 9), experts=st.integers(1, 5), seed=st.integers(0, 99), router=st.sampled_from(ROUTERS),
       mask=st.sampled_from(["none", "some", "all"]), training=st.booleans())  # fmt: skip
def test_the_output_is_each_tokens_chosen_expert_times_its_weight(tokens, experts, seed, router, mask, training):
    torch.manual_seed(seed)
    layer = build_moe_layer(router, 4, 6, experts).double().train(training)
    if router == "sparsemixer":
        torch.nn.init.normal_(layer.gate.omega)  # it starts at one, where leaving it out would not be noticed
    x = torch.randn(tokens, 4, dtype=torch.float64)
    padding = {"none": None, "some": torch.rand(tokens) < 0.4, "all": torch.ones(tokens, dtype=torch.bool)}[mask]
    out = layer(x, padding)
    torch.testing.assert_close(out, token_by_token(layer, x))
    out.sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("router", sorted(GATES))
def test_an_empty_batch_works_and_has_zero_gradient(router):
    layer = build_moe_layer(router, 4, 6, 3)
    x = torch.zeros(0, 2, 4, requires_grad=True)
    out = layer(x)
    (out.sum() + sum(layer.routing.aux_losses.values())).backward()
    assert out.shape == (0, 2, 4) and x.grad.shape == (0, 2, 4)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())


def test_an_idle_layer_treats_every_token_as_padding():
    layer = build_moe_layer("switch", 4, 6, 3, num_shared_experts=1)
    layer.idle = True
    assert not layer(torch.randn(5, 4)).any() and not layer(torch.randn(2, 5, 4), torch.rand(2, 5) < 0.5).any()
    assert not layer.routing.statistics()["load"].any() and not layer.routing.aux_losses["balance"]


@pytest.mark.parametrize("router", ROUTERS)
def test_all_tokens_can_go_to_one_expert(router):
    layer = build_moe_layer(router, 4, 6, 3).eval()
    with torch.no_grad():
        layer.gate.projection.weight.copy_(torch.tensor([[0.0], [5.0], [0.0]]).expand(3, 4))
    x = torch.rand(50, 4)
    torch.testing.assert_close(layer(x), token_by_token(layer, x))
    assert layer.routing.statistics()["load"].tolist() == [[0, 50, 0]]


@pytest.mark.parametrize("router", ROUTERS)
def test_padding_changes_no_output_no_loss_and_no_gradient(router):
    """With the same noise for non-padding tokens, a padded batch gives the same result as these tokens alone."""
    padded = build_moe_layer(router, 4, 6, 3).double()
    alone = copy.deepcopy(padded)
    x = torch.randn(5, 6, 4, dtype=torch.float64)
    padding = torch.rand(5, 6) < 0.4
    real = ~padding.flatten()
    noise = padded.gate.draw_noise(torch.zeros(30, 3, dtype=torch.float64))
    padded.gate.draw_noise = lambda logits: noise
    alone.gate.draw_noise = lambda logits: type(noise)(*(n[real] for n in noise)) if isinstance(noise, tuple) else noise[real]
    outputs = padded(x, padding), alone(x.flatten(0, 1)[real])
    for layer, out in zip((padded, alone), outputs):
        (out.square().sum() + sum(layer.routing.aux_losses.values())).backward()
    torch.testing.assert_close(outputs[0].flatten(0, 1)[real], outputs[1])
    assert not outputs[0].flatten(0, 1)[~real].any()
    for name, loss in padded.routing.aux_losses.items():
        torch.testing.assert_close(loss, alone.routing.aux_losses[name])
    for name, value in padded.routing.statistics().items():
        torch.testing.assert_close(value, alone.routing.statistics()[name])
    for ours, theirs in zip(padded.parameters(), alone.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("router", sorted(name for name, gate in GATES.items() if gate.causal))
def test_at_inference_a_tokens_output_does_not_depend_on_its_batch(router):
    layer = build_moe_layer(router, 8, 16, 4).eval()
    x = torch.randn(64, 8)
    batch = layer(x)
    alone = torch.cat([layer(token.unsqueeze(0)) for token in x])
    torch.testing.assert_close(batch, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_keep_their_dtype_and_route_in_float32(router, dtype):
    layer = build_moe_layer(router, 8, 16, 4).to(dtype)
    x = torch.randn(20, 8).to(dtype).requires_grad_()
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == x.grad.dtype == dtype
    assert layer.routing.combine_weight.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in layer.routing.aux_losses.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_autocast_routes_in_float32(router):
    layer = build_moe_layer(router, 8, 16, 4).eval()
    x = torch.randn(20, 8)
    exact = layer(x)
    expert_index = layer.routing.expert_index
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(layer.routing.expert_index, expert_index) and layer.routing.combine_weight.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("router", sorted(GATES))
def test_a_layer_can_be_copied_and_saved_after_a_forward(router):
    layer = build_moe_layer(router, 4, 6, 3)
    layer(torch.randn(5, 4))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(5, 4)
    layer.idle = True
    twins = copy.deepcopy(layer), torch.load(buffer, weights_only=False)
    layer.idle = False
    for twin in twins:
        assert twin.routing is None
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x))


def test_the_layer_is_a_fairscale_moelayer():
    layer = build_moe_layer("switch", 4, 6, 3)
    assert isinstance(layer, MOELayer) and layer.l_aux is None and layer.num_local_experts == 3
    layer(torch.randn(5, 4))
    assert layer.l_aux is layer.routing.aux_losses["balance"]


def test_mismatched_shapes_are_named():
    layer = build_moe_layer("switch", 4, 6, 3)
    with pytest.raises(ValueError, match="x has width 5, but the layer was built for model_dim=4"):
        layer(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="x has width 5"):
        layer(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match=r"padding_mask of shape \(3, 2\) does not match x of \(2, 3, 4\)"):
        layer(torch.zeros(2, 3, 4), torch.zeros(3, 2, dtype=torch.bool))


def test_the_core_works_without_fairseq():
    program = """
import sys
sys.modules["fairseq"] = None  # as if it were not installed
import torch
from fairseq_sparsemixer import build_moe_layer
layer = build_moe_layer("sparsemixer", model_dim=4, hidden_dim=6, num_experts=3)
layer(torch.randn(5, 4)).sum().backward()
assert not any(name.startswith("fairseq.") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
