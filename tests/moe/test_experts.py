"""The stacked experts, compared with separate torch.nn.functional.linear calls."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.moe.experts import Experts


def one_by_one(experts, rows, counts, activation):
    """Run each expert on its own rows."""
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        x = rows[start : start + count]
        hidden = F.linear(x, experts.weight_in[expert].t(), experts.bias_in[expert])
        outputs.append(F.linear(activation(hidden), experts.weight_out[expert].t(), experts.bias_out[expert]))
        start += count
    return torch.cat(outputs)


def gated_by(function):
    def activation(hidden):
        gate, linear = hidden.chunk(2, -1)
        return function(gate) * linear

    return activation


@pytest.mark.parametrize("name, activation", [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu),
                                              ("geglu", gated_by(F.gelu)), ("swiglu", gated_by(F.silu))])  # fmt: skip
def test_output_and_gradients_equal_those_of_separate_networks(name, activation):
    experts = Experts(3, 4, 5, name).double()
    twin = copy.deepcopy(experts)
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    rows_of_twin = rows.detach().clone().requires_grad_()
    counts = [4, 0, 3]
    out, expected = experts(rows, counts), one_by_one(twin, rows_of_twin, counts, activation)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(rows.grad, rows_of_twin.grad)
    for ours, theirs in zip(experts.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)


@settings(max_examples=25)
@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=5))
def test_any_counts_work_and_experts_without_rows_get_a_zero_gradient(counts):
    experts = Experts(len(counts), 3, 4).double()
    rows = torch.randn(sum(counts), 3, dtype=torch.float64)
    out = experts(rows, counts)
    torch.testing.assert_close(out, one_by_one(experts, rows, counts, F.relu))
    out.sum().backward()
    for parameter in experts.parameters():
        for expert, count in enumerate(counts):
            if count == 0:
                assert not parameter.grad[expert].any()


def test_gradients_pass_if_either_experts_or_rows_are_frozen():
    experts = Experts(2, 3, 4).requires_grad_(False)
    rows = torch.randn(5, 3, requires_grad=True)
    experts(rows, [2, 3]).sum().backward()
    assert rows.grad.abs().sum() > 0 and experts.weight_in.grad is None
    experts.requires_grad_(True)
    experts(rows.detach(), [2, 3]).sum().backward()
    assert experts.weight_in.grad.abs().sum() > 0


def test_autocast_behaves_as_for_linear_layers():
    experts = Experts(2, 8, 16)
    rows = torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(rows, [3, 3])
        expected = one_by_one(experts, rows, [3, 3], F.relu)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert experts.weight_in.grad.dtype == torch.float32


def test_dropout_applies_to_the_hidden_layer_in_training_only():
    experts = Experts(2, 4, 8, dropout=1.0)
    rows = torch.randn(5, 4)
    assert torch.equal(experts(rows, [2, 3]), torch.cat([experts.bias_out[0].expand(2, 4), experts.bias_out[1].expand(3, 4)]))
    torch.testing.assert_close(experts.eval()(rows, [2, 3]), one_by_one(experts, rows, [2, 3], F.relu))


def test_sharded_experts_load_their_rows_of_a_full_checkpoint():
    whole, share = Experts(4, 3, 5), Experts(4, 3, 5)
    share.shard(2, 2)
    share.load_state_dict(whole.state_dict())
    rows = torch.randn(6, 3)
    torch.testing.assert_close(share(rows, [1, 5]), whole(rows, [0, 0, 1, 5]))
    share.load_state_dict(share.state_dict())  # and its own state


def test_every_expert_is_initialised_within_a_linear_layers_bound():
    experts = Experts(50, 16, 64)
    assert experts.weight_in.abs().max() <= 1 / 4 and experts.weight_in.abs().max() > 0.24
    assert experts.weight_out.abs().max() <= 1 / 8 and experts.bias_out.abs().max() <= 1 / 8
    assert not torch.equal(experts.weight_in[0], experts.weight_in[1])


def test_an_unknown_activation_lists_the_known_ones():
    with pytest.raises(ValueError, match="activation=tanhh is unknown; choose from relu, gelu, silu, geglu, swiglu"):
        Experts(2, 3, 4, activation="tanhh")


def test_any_function_can_be_an_activation():
    rows = torch.randn(3, 4)
    experts = Experts(1, 4, 8, activation=torch.tanh)
    torch.testing.assert_close(experts(rows, [3]), one_by_one(experts, rows, [3], torch.tanh))


def test_weights_and_biases_are_initialised_uniformly_by_fan_in():
    experts = Experts(num_experts=8, model_dim=64, hidden_dim=256)
    for parameters, fan_in in (((experts.weight_in, experts.bias_in), 64), ((experts.weight_out, experts.bias_out), 256)):
        bound = 1 / math.sqrt(fan_in)
        for parameter in parameters:
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
