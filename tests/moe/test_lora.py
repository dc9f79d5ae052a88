"""Low-rank adapters of experts, compared with the formula x (W + s A B) + b in float64 (arXiv 2106.09685, Eq. 3)."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.kernels import choice
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import ExpertGroup

ADAPTERS = {"lora_in_a", "lora_in_b", "lora_out_a", "lora_out_b"}


def with_adapters(rank=2, alpha=6.0, activation="relu", dtype=torch.float64):
    experts = Experts(3, 4, 5, activation).to(dtype)
    experts.add_adapters(rank, alpha)
    for name in ("lora_in_b", "lora_out_b"):
        torch.nn.init.normal_(experts.get_parameter(name))
    return experts


def by_formula(experts, rows, counts, scale):
    outputs, start = [], 0
    for e, count in enumerate(counts):
        x = rows[start : start + count]
        inner = x @ experts.weight_in[e] + scale * (x @ experts.lora_in_a[e]) @ experts.lora_in_b[e] + experts.bias_in[e]
        hidden = inner.relu()
        low = scale * (hidden @ experts.lora_out_a[e]) @ experts.lora_out_b[e]
        outputs.append(hidden @ experts.weight_out[e] + low + experts.bias_out[e])
        start += count
    return torch.cat(outputs)


@pytest.mark.parametrize("alpha, scale", [(6.0, 3.0), (None, 1.0)])
@pytest.mark.parametrize("recompute", [False, True])
def test_output_and_gradients_are_those_of_the_formula(alpha, scale, recompute):
    experts = with_adapters(2, alpha)
    experts.recompute = recompute
    twin, counts = copy.deepcopy(experts), [4, 0, 3]
    rows = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    theirs = rows.detach().clone().requires_grad_()
    upstream = torch.randn(7, 4, dtype=torch.float64)
    out, expected = experts(rows, counts), by_formula(twin, theirs, counts, scale)
    torch.testing.assert_close(out, expected)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(rows.grad, theirs.grad)
    for (name, ours), other in zip(experts.named_parameters(), twin.parameters()):
        assert (ours.grad is not None) == ours.requires_grad == (name in ADAPTERS)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, other.grad)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_new_adapters_change_no_output(activation):
    experts = Experts(3, 4, 5, activation)
    twin, rows, counts = copy.deepcopy(experts), torch.randn(6, 4), [1, 2, 3]
    experts.add_adapters(2)
    assert torch.equal(experts(rows, counts), twin(rows, counts))
    assert experts.lora_in_a.any() and experts.lora_out_a.any()


def test_adapters_are_sharded_and_marked_like_the_experts():
    layer = build_moe_layer("switch", 4, 5, 4)
    layer.experts.add_adapters(2)
    whole = {name: parameter.detach().clone() for name, parameter in layer.experts.named_parameters()}
    shard_experts(layer, ExpertGroup(size=2, index=1, group=None, replicas=None, world_size=2, first_group=True))
    for name, parameter in layer.experts.named_parameters():
        assert torch.equal(parameter, whole[name][2:]) and parameter.expert
        assert parameter.requires_grad == (name in ADAPTERS)
    state = {name: torch.ones_like(value) for name, value in whole.items()}
    layer.experts.load_state_dict(state)  # those of all ranks
    assert all((parameter == 1).all() for parameter in layer.experts.parameters())


def test_a_rank_below_one_is_refused():
    with pytest.raises(ValueError, match="expert_lora_rank=0 must be at least 1"):
        Experts(2, 3, 4).add_adapters(0)


def kept_for_backward(run):
    """Bytes of the tensors that the forward `run` keeps, each storage counted once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    return out, sum(seen.values())


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients_bit_for_bit(activation, dropout):
    experts = Experts(3, 8, 16, activation, dropout)
    gradients, outputs = [], []
    for experts.recompute in (False, True):
        torch.manual_seed(1)
        rows = torch.randn(9, 8, requires_grad=True)
        torch.manual_seed(2)
        out = experts(rows, [5, 0, 4])
        torch.rand(3)  # others draw between forward and backward
        outputs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), [rows, *experts.parameters()]))
    assert torch.equal(*outputs)
    assert all(torch.equal(one, other) for one, other in zip(*gradients)) and len(gradients[0]) == 5


def test_recomputation_keeps_no_hidden_layer():
    experts, rows = Experts(2, 4, 64), torch.randn(100, 4, requires_grad=True)
    hidden = 100 * 64 * 4  # bytes
    _, kept = kept_for_backward(lambda: experts(rows, [60, 40]))
    experts.recompute = True
    _, without = kept_for_backward(lambda: experts(rows, [60, 40]))
    assert kept > hidden and kept - without >= hidden
    experts.eval()
    _, inference = kept_for_backward(lambda: experts(rows, [60, 40]))
    assert inference == kept


def test_recomputation_within_a_recomputed_layer_is_exact():
    layer = build_moe_layer("switch", 4, 6, 3, jitter_eps=0.0)
    gradients = []
    for layer.experts.recompute in (False, True):
        x = torch.linspace(-1, 1, 32).view(8, 4).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def layer_gradients(layer, fused, recompute):
    """The output and all gradients of the layer on fixed tokens; fused: by the kernels' formulas."""
    twin = copy.deepcopy(layer)
    twin.experts.recompute = recompute
    x = torch.linspace(-1, 1, 160).sin().view(20, 8).requires_grad_()
    torch.manual_seed(3)
    with choice.forced(fused):
        out = twin(x)
        out.square().sum().backward()
    return [out, x.grad, *(parameter.grad for parameter in twin.parameters() if parameter.grad is not None)]


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_adapters_and_recomputation_are_the_same_by_the_fused_kernels(num_shared_experts):
    layer = build_moe_layer("switch", 8, 16, 4, jitter_eps=0.0, num_shared_experts=num_shared_experts)
    layer.experts.add_adapters(2, 4.0)
    for name in ("lora_in_b", "lora_out_b"):
        torch.nn.init.normal_(layer.experts.get_parameter(name))
    plain, fused = (layer_gradients(layer, kernels, False) for kernels in (False, True))
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
    assert len(plain) == 2 + 1 + 4 + 4 * num_shared_experts  # of the gate, the adapters and the shared experts


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputation_by_the_fused_kernels_is_exact(dropout):
    layer = build_moe_layer("switch", 8, 16, 4, jitter_eps=0.0, dropout=dropout)
    plain, again = (layer_gradients(layer, True, recompute) for recompute in (False, True))
    assert all(torch.equal(one, other) for one, other in zip(plain, again)) and len(plain) == 7
