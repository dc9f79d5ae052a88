"""The base class of all gates: the projection, and the checks of options."""

import math

import pytest
import torch

from fairseq_sparsemixer.moe.gates import GATES, build_gate
from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding, require_jitter, require_top_k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_computed_in_float32_for_any_token_dtype(dtype, autocast):
    gate = Gate(16, 4).to(dtype)
    tokens = torch.randn(9, 16).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = gate.logits(tokens)
    exact = tokens.double() @ gate.projection.weight.double().t()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)


def test_float64_stays_float64():
    gate = Gate(16, 4).double()
    tokens = torch.randn(9, 16, dtype=torch.float64)
    torch.testing.assert_close(gate.logits(tokens), tokens @ gate.projection.weight.t())


def test_the_router_bias_starts_at_zero_and_is_added_in_float32():
    gate = Gate(16, 4, router_bias=True).to(torch.bfloat16)
    tokens = torch.randn(9, 16).to(torch.bfloat16)
    assert gate.projection.bias.tolist() == [0] * 4
    torch.nn.init.normal_(gate.projection.bias)
    exact = tokens.double() @ gate.projection.weight.double().t() + gate.projection.bias.double()
    logits = gate.logits(tokens)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-6)
    logits.sum().backward()
    assert gate.projection.bias.grad.tolist() == [9] * 4


@pytest.mark.parametrize("num_experts", [0, -1])
def test_at_least_one_expert_is_required(num_experts):
    with pytest.raises(ValueError, match=f"num_experts={num_experts} must be at least 1"):
        Gate(16, num_experts)


def test_jitter_out_of_range_is_refused():
    assert (require_jitter(0), require_jitter(float("inf")), require_jitter(1, most=1)) == (0, float("inf"), 1)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"jitter_eps={wrong} must be at least 0"):
            require_jitter(wrong)
    with pytest.raises(ValueError, match="jitter_eps=1.5 must lie between 0 and 1; the papers use 0.1"):
        require_jitter(1.5, most=1)


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_must_not_exceed_the_number_of_experts(top_k):
    assert require_top_k(4, 4) == 4
    with pytest.raises(ValueError, match=f"top_k={top_k} must lie between 1 and num_experts=4"):
        require_top_k(top_k, 4)


def test_padding_has_no_weight_and_no_gradient():
    weight = torch.rand(3, 2, requires_grad=True)
    hidden = hide_padding(weight, torch.tensor([False, True, False]))
    hidden.sum().backward()
    assert hidden[1].tolist() == [0, 0] and weight.grad.tolist() == [[1, 1], [0, 0], [1, 1]]
    assert hide_padding(weight, None) is weight


@pytest.mark.parametrize("router, experts", [("base", 1), ("dense_st", 1), ("expert_choice", 2), ("gshard", 2), ("hash", 1),
                                             ("round_robin", 1),
                                             ("noisy_topk", 2), ("sinkhorn", 1), ("sparsemixer", 1), ("sparsemixer_v2", 2),
                                             ("switch", 1)])  # fmt: skip
def test_experts_per_token_is_the_mean_number_that_run_at_inference(router, experts):
    gate = build_gate(router, 6, 4).eval()
    routing = gate(torch.randn(40, 6))
    unrouted = routing.unrouted()
    run = routing.expert_index.numel() if unrouted is None else int((~unrouted).sum())
    assert gate.experts_per_token == experts == run / 40


def test_a_gate_wants_token_ids_only_if_it_says_so():
    assert GATES["hash"].wants_token_ids and not Gate.wants_token_ids and not GATES["switch"].wants_token_ids


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ["base", "dense_st", "expert_choice", "gshard", "noisy_topk", "sinkhorn", "sparsemixer_v2"])
def test_the_probabilities_are_the_softmax_of_each_tokens_logits(router, training):
    logits = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    probabilities = build_gate(router, 6, 4).train(training).route(logits).probabilities
    exponentials = [[math.exp(value) for value in row] for row in logits.tolist()]
    expected = [[value / sum(row) for value in row] for row in exponentials]
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float64))
    assert not probabilities.requires_grad
