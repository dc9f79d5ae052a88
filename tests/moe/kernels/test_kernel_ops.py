"""The fused functions against float64, one expert and one token at a time.

On a CPU the ops are formulas; test_kernels_interpreted.py runs these tests again with the kernels in Triton's interpreter.
"""

import itertools
import os

import pytest
import torch
import torch.nn.functional as F

from fairseq_sparsemixer.moe.estimators import ESTIMATORS, get_estimator
from fairseq_sparsemixer.moe.experts import KNOWN
from fairseq_sparsemixer.moe.gates.fused import fused_routing, mixer_options
from fairseq_sparsemixer.moe.gates.sparsemixer import SamplingNoise, sparsemixer_routing
from fairseq_sparsemixer.moe.gates.sparsemixer_v2 import sparsemixer_v2_routing
from fairseq_sparsemixer.moe.gates.switch import switch_routing
from fairseq_sparsemixer.moe.kernels import functions, ops, self_check
from fairseq_sparsemixer.moe.kernels.functions import RouterOptions

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GROUPS = {  # rows of each expert, and rows behind the last
    "random": ([5, 3, 0, 9], 2), "empty": ([0, 0, 0], 3), "no rows": ([0, 0], 0), "single": ([7], 0), "one each": ([1, 1, 1], 0),
    "huge": ([0, 300, 1], 1),
}  # fmt: skip
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # relative to the largest value

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # 0 / 0 and inf / inf, on purpose


def assert_close(found, expected, dtype=torch.float32):
    """Elementwise within the dtype's tolerance of the largest value."""
    assert found.shape == expected.shape
    largest = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCE[dtype] * max(1.0, largest))


def spread(counts):
    """ends [E], and for each expert its slice of the rows."""
    ends = torch.tensor(counts).cumsum(0)
    return ends.to(torch.int32), [slice(stop - count, stop) for stop, count in zip(ends.tolist(), counts)]


def randn(*shape, dtype=torch.float64):
    """Numbers that the dtype of a test can hold exactly."""
    return torch.randn(*shape).to(dtype).double()


@pytest.mark.parametrize("pairs, experts", [(0, 3), (37, 1), (37, 5), (2500, 3), (70, 260)])
@pytest.mark.parametrize("masked", [False, True])
def test_pairs_are_sorted_stably_by_expert_with_unrouted_ones_last(pairs, experts, masked):
    expert = torch.randint(experts, (pairs, 1))
    unrouted = torch.rand(pairs, 1) < 0.3 if masked else None
    order = functions.sort(expert, unrouted, experts)
    group = [experts if masked and unrouted[p] else expert[p].item() for p in range(pairs)]
    assert order.pairs.tolist() == sorted(range(pairs), key=lambda p: group[p])
    assert order.pairs[order.place.long()].tolist() == list(range(pairs))
    assert order.ends.tolist() == [sum(g <= e for g in group) for e in range(experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("k, bound, biased, scaled", [(1, None, True, True), (2, 16, True, False), (3, None, False, True)])
def test_gather_and_combine_agree_with_a_loop_over_tokens_and_their_gradients_are_exact(k, bound, biased, scaled, dtype):
    tokens, experts, width = 9, 4, 37
    index = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    index[index == 2] = 3  # an idle expert
    unrouted = torch.zeros(tokens, k, dtype=torch.bool)
    unrouted[2], unrouted[5, 0] = True, True
    rows = tokens * k if bound is None else bound
    assert (~unrouted).sum() <= rows
    leaves = [randn(tokens, width, dtype=dtype), torch.rand(tokens, k).double()]
    leaves += [randn(experts, width, dtype=dtype)] * biased + [randn(width, dtype=dtype)] * scaled
    upstream = randn(tokens, width, dtype=dtype)

    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    x, weight, *rest = exact
    expected = torch.zeros(tokens, width, dtype=torch.float64)
    for s, j in itertools.product(range(tokens), range(k)):
        if not unrouted[s, j]:
            row = x[s] + (rest[0][index[s, j]] if biased else 0)
            expected = expected.index_add(0, torch.tensor([s]), (weight[s, j] * row * (rest[-1] if scaled else 1)).unsqueeze(0))
    expected.backward(upstream)

    ours = [leaf.to(torch.float32 if leaf is leaves[1] else dtype).requires_grad_() for leaf in leaves]
    order = functions.sort(index, unrouted, experts)
    gathered = functions.gather(ours[0], order, rows, k, dtype)
    assert not gathered[int(order.ends[-1]) :].any()
    out = functions.combine(gathered, ours[1], ours[2] if biased else None, ours[-1] if scaled else None, index, order)
    out.backward(upstream.to(dtype))
    assert_close(out, expected, dtype)
    for own, reference in zip(ours, exact):
        assert own.grad.dtype == own.dtype
        assert_close(own.grad, reference.grad, dtype)


def test_a_gather_casts_and_its_backward_sums_in_float32():
    tokens = torch.randn(6, 40, requires_grad=True)
    order = functions.sort(torch.tensor([[0, 1]] * 6), None, 2)
    rows = functions.gather(tokens, order, 12, 2, torch.float16)
    assert rows.dtype == torch.float16
    rows.sum().backward()
    assert tokens.grad.dtype == torch.float32 and torch.equal(tokens.grad, torch.full((6, 40), 2.0))


def test_large_half_precision_gradients_do_not_overflow_in_the_router():
    rows, weight = torch.full((2, 64), 100.0, dtype=torch.float16), torch.rand(2, 1, requires_grad=True)
    index = torch.zeros(2, 1, dtype=torch.int64)
    out = functions.combine(rows, weight, None, None, index, functions.sort(index, None, 1))
    out.backward(torch.full((2, 64), 1740.0, dtype=torch.float16))
    assert weight.grad.tolist() == [[64 * 100 * 1740.0]] * 2


def by_expert(rows, weights, where, activation, keep=None, factor=1.0):
    """The definition, one expert at a time."""
    out = []
    for expert, own in enumerate(where):
        hidden = KNOWN[activation](rows[own] @ weights[0][expert] + weights[1][expert])
        hidden = hidden if keep is None else hidden * keep[own] * factor
        out.append(hidden @ weights[2][expert] + (weights[3][expert] if len(weights) > 3 else 0))
    return torch.cat(out)


FEED_FORWARD = [(name, "relu", torch.float32) for name in GROUPS]
FEED_FORWARD += [("random", name, torch.float32) for name in KNOWN if name != "relu"]
FEED_FORWARD += [("random", "gelu", torch.float16), ("huge", "relu", torch.float16)]


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("groups, activation, dtype", FEED_FORWARD)
def test_the_feed_forward_and_all_its_gradients_agree_with_each_expert_in_float64(groups, activation, dtype, biased):
    counts, tail = GROUPS[groups]
    ends, where = spread(counts)
    used, width, hidden = sum(counts), 19, 21
    inner = 2 * hidden if activation in ("geglu", "swiglu") else hidden
    shapes = [(width, inner), (inner,), (hidden, width), (width,)][: 4 if biased else 3]
    leaves = [randn(used + tail, width, dtype=dtype) / 4]
    leaves += [randn(len(counts), *shape, dtype=dtype) / 4 for shape in shapes]
    upstream = randn(used + tail, width, dtype=dtype)
    exact = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = by_expert(exact[0], exact[1:], where, activation)
    expected.backward(upstream[:used])

    ours = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    out = functions.feed_forward(*ours[:4], ours[4] if biased else None, ends, activation)
    out.backward(upstream.to(dtype))
    assert_close(out[:used], expected, dtype)
    assert_close(ours[0].grad[:used], exact[0].grad[:used], dtype)
    for own, reference in zip(ours[1:], exact[1:]):
        assert own.grad.dtype == dtype
        assert_close(own.grad, reference.grad, dtype)
    if biased:
        assert not out[used:].any() and not ours[0].grad[used:].any()


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_dropout_zeroes_the_same_hidden_units_forward_and_backward(activation):
    ends, where = spread([4, 6])
    inner = 16 if activation == "swiglu" else 8
    leaves = [torch.randn(10, 5), torch.randn(2, 5, inner), torch.randn(2, inner), torch.randn(2, 8, 5), torch.randn(2, 5)]
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    torch.manual_seed(3)
    functions.feed_forward(*ours, ends, activation, dropout=0.25).square().sum().backward()
    torch.manual_seed(3)
    keep = torch.empty(10, 8, dtype=torch.bool).bernoulli_(0.75)
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    by_expert(exact[0], exact[1:], where, activation, keep, 1 / 0.75).square().sum().backward()
    for own, reference in zip(ours, exact):
        assert_close(own.grad, reference.grad)


def test_what_is_behind_the_last_expert_reaches_nothing():
    ends, _ = spread([3, 2])
    rows, weights = torch.randn(8, 6), [torch.randn(2, 6, 4), torch.randn(2, 4), torch.randn(2, 4, 6), torch.randn(2, 6)]
    results = []
    for behind in (0.0, float("nan")):
        rows[5:] = behind
        leaves = [leaf.clone().requires_grad_() for leaf in (rows, *weights)]
        out = functions.feed_forward(*leaves, ends, "gelu")
        upstream = torch.ones_like(out)
        upstream[5:] = behind
        out.backward(upstream)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_a_nan_in_an_expert_appears_in_its_rows_and_no_others():
    ends, _ = spread([3, 2])
    for activation, part in [("relu", 0), ("relu", 1), ("gelu", 2), ("silu", 3), ("silu", 1)]:
        weights = [torch.randn(2, 6, 4), torch.randn(2, 4), torch.randn(2, 4, 6), torch.randn(2, 6)]
        weights[part][1] = torch.nan
        out = functions.feed_forward(torch.randn(5, 6), *weights, ends, activation)
        assert out[3:].isnan().all() and out[:3].isfinite().all(), (activation, part)


@pytest.mark.parametrize("tokens, experts, width", [(70, 3, 37), (5, 70, 16), (0, 4, 8)])
def test_the_projection_and_its_gradients_agree_with_float64(tokens, experts, width):
    x, weight = torch.randn(tokens, width).half(), torch.randn(experts, width)
    upstream, other = torch.randn(tokens, experts), torch.randn(tokens, width).half()
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = exact[0] @ exact[1].t()
    torch.autograd.backward([expected, exact[0].clone()], [upstream.double(), other.double()])
    ours = [x.requires_grad_(), weight.requires_grad_()]
    logits, passed = functions.project(*ours)
    torch.autograd.backward([logits, passed], [upstream, other])
    assert logits.dtype == torch.float32
    assert_close(logits, expected)
    assert_close(ours[0].grad, exact[0].grad, torch.float16)
    assert_close(ours[1].grad, exact[1].grad)


def test_each_use_of_the_tokens_alone_gets_its_gradient():
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    logits, passed = functions.project(x, weight)
    (only_passed,) = torch.autograd.grad(passed.sum(), x, retain_graph=True)
    (only_logits,) = torch.autograd.grad(logits.sum(), x)
    assert torch.equal(only_passed, torch.ones_like(x))
    assert_close(only_logits, weight.sum(0).expand_as(x))


def mixer_noise(uniform):
    """The noise of the gates' own functions for the same uniform numbers [S, k, E + 1]."""
    draws = [SamplingNoise(-(-uniform[:, j, :-1].log()).log(), uniform[:, j, -1]) for j in range(uniform.size(1))]
    return [SamplingNoise(draw.gumbel.double(), draw.coin.double()) for draw in draws]


def compare_routing(reference, options, logits, noise, bias, padding):
    """The fused routing of float32 logits against a gate's own function in float64: decision, losses and gradient."""
    exact, ours = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected, found = reference(exact), fused_routing(ours, padding, noise, bias, options)
    assert torch.equal(found.expert_index, expected.expert_index)
    assert_close(found.combine_weight, expected.combine_weight)
    assert_close(found.probabilities, expected.probabilities)
    upstream = torch.randn(expected.combine_weight.shape, dtype=torch.float64)
    for routing, of in ((expected, upstream), (found, upstream.float())):
        loss = (routing.combine_weight * of).sum()
        (loss + 3 * routing.aux_losses["balance"] + 2 * routing.aux_losses["router_z"]).backward()
    for name in expected.aux_losses:
        assert_close(found.aux_losses[name], expected.aux_losses[name])
    assert_close(ours.grad, exact.grad)


@pytest.mark.parametrize("biased, padded", [(False, False), (True, True)])
@pytest.mark.parametrize("estimator, at_argmax", [(name, False) for name in ESTIMATORS] + [("midpoint", True), ("inf", True)])
@pytest.mark.parametrize("router, k", [("sparsemixer", 1), ("sparsemixer_v2", 1), ("sparsemixer_v2", 3)])
def test_the_mixers_routing_agrees_with_their_own_functions_in_float64(router, k, estimator, at_argmax, biased, padded):
    tokens, experts, jitter = 37, 5, 0.3
    logits, uniform = torch.randn(tokens, experts), torch.rand(tokens, k, experts + 1).clamp(min=1e-6)
    bias = torch.randn(experts) if biased else None
    padding = torch.rand(tokens) < 0.3 if padded else None
    chosen = get_estimator(estimator, first_order_argmax=not at_argmax)
    noise = mixer_noise(uniform)
    wide = None if bias is None else bias.double()

    def reference(exact):
        if router == "sparsemixer":
            return sparsemixer_routing(exact, padding, jitter, chosen, noise[0], bias=wide)
        return sparsemixer_v2_routing(exact, padding, k, jitter, chosen, noise, bias=wide)

    compare_routing(reference, mixer_options(router, k, jitter, chosen, True, True), logits, uniform, bias, padding)


@pytest.mark.parametrize("jitter", [0.0, 0.1, float("inf")])
@pytest.mark.parametrize("router, k", [("sparsemixer", 1), ("sparsemixer_v2", 2)])
def test_inference_of_the_mixers_agrees_with_their_own_functions(router, k, jitter):
    logits, estimator = torch.randn(130, 6), get_estimator("heun3")  # more than one block

    def reference(exact):
        if router == "sparsemixer":
            return sparsemixer_routing(exact, None, jitter, estimator)
        return sparsemixer_v2_routing(exact, None, k, jitter, estimator)

    compare_routing(reference, mixer_options(router, k, jitter, estimator, False, True), logits, None, None, None)


def test_without_sampling_the_arg_max_runs_and_only_the_coin_is_drawn():
    logits, uniform, estimator = torch.randn(20, 4), torch.rand(20, 1, 5), get_estimator("midpoint", first_order_argmax=False)
    noise = SamplingNoise(torch.zeros(20, 4, dtype=torch.float64), uniform[:, 0, -1].double())
    options = mixer_options("sparsemixer", 1, 0.1, estimator, True, sampled=False)
    compare_routing(lambda exact: sparsemixer_routing(exact, None, 0.1, estimator, noise), options, logits, uniform, None, None)


@pytest.mark.parametrize("jittered, biased, padded", [(False, False, False), (True, False, True), (True, True, True)])
@pytest.mark.parametrize("tokens, experts", [(37, 5), (3, 1), (0, 4)])
def test_switch_routing_agrees_with_its_own_function_in_float64(tokens, experts, jittered, biased, padded):
    logits = torch.randn(tokens, experts)
    jitter = torch.empty_like(logits).uniform_(0.9, 1.1) if jittered else None
    bias = torch.randn(experts) if biased else None
    padding = torch.rand(tokens) < 0.3 if padded else None

    def reference(exact):
        wide = [None if tensor is None else tensor.double() for tensor in (jitter, bias)]
        return switch_routing(exact, padding, wide[0], bias=wide[1])

    compare_routing(reference, RouterOptions("switch", 1), logits, jitter, bias, padding)


@pytest.mark.parametrize("router", ["switch", "sparsemixer"])
def test_masks_and_numbers_between_others_in_memory_are_read_right(router):
    logits, padding, bias = torch.randn(9, 4), torch.rand(9, 3) < 0.5, torch.randn(4, 2)
    uniform = torch.rand(9, 4) if router == "switch" else torch.rand(9, 1, 5)
    noise = torch.stack([uniform, torch.full_like(uniform, 0.5)], -1)[..., 0]
    found, options = [], RouterOptions(router, 1, 0.5, node=1)
    for given in ((noise, bias[:, 0], padding[:, 0]), (uniform, bias[:, 0].clone(), padding[:, 0].clone())):
        leaf = logits.clone().requires_grad_()
        routed = functions.route(leaf, *given, options)
        (routed[1].sum() + routed[3] + routed[4]).backward()
        found.append([*routed, leaf.grad])
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_a_batch_of_padding_alone_has_no_losses_and_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    found = fused_routing(logits, torch.ones(4, dtype=torch.bool), None, None, RouterOptions("switch", 1))
    sum(found.aux_losses.values()).backward()
    assert not found.combine_weight.any() and not any(found.aux_losses.values()) and not logits.grad.any()


def test_indices_stay_valid_where_logits_are_nan():
    for router in ("switch", "sparsemixer", "sparsemixer_v2"):
        found = fused_routing(torch.full((3, 5), torch.nan), None, None, None, RouterOptions(router, 1))
        assert 0 <= found.expert_index.min() and found.expert_index.max() < 5 and found.combine_weight.isnan().all()


def test_results_are_the_same_bit_for_bit_each_time():
    ends, _ = spread([40, 0, 150])
    leaves = [torch.randn(190, 24), torch.randn(3, 24, 16), torch.randn(3, 16), torch.randn(3, 16, 24), torch.randn(3, 24)]
    results = []
    for _ in range(2):
        fresh = [leaf.clone().requires_grad_() for leaf in leaves]
        out = functions.feed_forward(*fresh, ends, "gelu")
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in fresh)])
    assert all(map(torch.equal, *results))


def test_clearing_touches_only_what_belongs_to_no_expert():
    ends, _ = spread([2, 0, 3])
    rows, stacked = torch.randn(9, 7), torch.randn(3, 4, 5)
    before = rows.clone(), stacked.clone()
    ops.clear_tail(rows, ends)
    ops.clear_idle(stacked, ends)
    assert torch.equal(rows[:5], before[0][:5]) and not rows[5:].any()
    assert torch.equal(stacked[::2], before[1][::2]) and not stacked[1].any()


def test_second_derivatives_are_refused_rather_than_wrong():
    ends, _ = spread([2, 3])
    rows = torch.randn(5, 8, requires_grad=True)
    weights = torch.randn(2, 8, 4), torch.randn(2, 4), torch.randn(2, 4, 8), torch.randn(2, 8)
    (grad,) = torch.autograd.grad(functions.feed_forward(rows, *weights, ends, "gelu").square().sum(), rows, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_frozen_weights_and_rows_get_no_gradient_and_change_no_other():
    ends, _ = spread([2, 3])
    leaves = [torch.randn(5, 8), torch.randn(2, 8, 4), torch.randn(2, 4), torch.randn(2, 4, 8), torch.randn(2, 8)]
    every = [leaf.clone().requires_grad_() for leaf in leaves]
    functions.feed_forward(*every, ends, "relu").square().sum().backward()
    for chosen in range(5):
        some = [leaf.clone().requires_grad_(place == chosen) for place, leaf in enumerate(leaves)]
        functions.feed_forward(*some, ends, "relu").square().sum().backward()
        assert torch.equal(some[chosen].grad, every[chosen].grad)


@pytest.mark.skipif(not INTERPRETED, reason="compares the kernels with the formulas")
@pytest.mark.parametrize("dtype, sizes", [(torch.float16, (64, 96)), (torch.float32, (37, 21))])
def test_every_kernel_agrees_with_its_formula(dtype, sizes):
    for name, arguments in self_check.examples(torch.device("cpu"), dtype, *sizes):
        assert self_check.agrees(name, arguments), name


@pytest.mark.skipif(not INTERPRETED, reason="compares the kernels with the formulas")
def test_every_kernel_but_products_agrees_with_its_formula_in_bfloat16():
    """The interpreter multiplies the bits of bfloat16 as integers, and truncates what it stores: one unit in the last place."""
    for name, arguments in self_check.examples(torch.device("cpu"), torch.bfloat16):
        if not name.startswith("grouped_"):
            assert self_check.agrees(name, arguments), name


@pytest.mark.skipif(INTERPRETED, reason="the same without the kernels")
def test_fake_implementations_give_the_shapes_and_strides_of_the_real_ones():
    for name, arguments in self_check.examples(torch.device("cpu"), torch.bfloat16, 37, 21):
        torch.library.opcheck(getattr(ops, name), arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_op_has_an_example():
    named = {name for name, _ in self_check.examples(torch.device("cpu"), torch.float32)}
    defined = {name for name, value in vars(ops).items() if isinstance(value, torch._library.custom_ops.CustomOpDef)}
    assert named == defined


@pytest.mark.parametrize("activation", KNOWN)
def test_the_formulas_of_slopes_are_the_derivatives(activation):
    value = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    KNOWN[activation](value).sum().backward()
    kept = F.relu(value.detach()) if activation == "relu" else value.detach()
    width = 4 if activation in ("geglu", "swiglu") else 8
    ends = torch.tensor([4], dtype=torch.int32)
    inner, _, _ = ops.bias_activation_backward(torch.ones(4, width), kept.float(), torch.zeros(1, 8), ends, activation, None, 1.0)
    assert_close(inner, value.grad)
