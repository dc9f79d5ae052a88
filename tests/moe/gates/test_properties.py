"""Properties of every registered router: hypothesis draws sizes, padding and logits."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fairseq_sparsemixer import build_gate, build_moe_layer
from fairseq_sparsemixer.moe.gates import GATES, gate_options
from fairseq_sparsemixer.moe.gates.capacity import POLICIES
from fairseq_sparsemixer.moe.gates.gshard import SECOND_EXPERT

few = settings(max_examples=12, suppress_health_check=list(HealthCheck))
LEAST_EXPERTS = {"gshard": 2}  # two different experts per token
UNBOUNDED = {"remoe"}  # combine weights above one
MAYBE_NONE = {"expert_choice", "expert_threshold", "remoe"}  # a token may get no expert


@st.composite
def cases(draw, router, dropless=False, fewest=0):
    """(gate in training or evaluation mode, tokens [S, M], padding [S] or None)."""
    num_experts = draw(st.integers(LEAST_EXPERTS.get(router, 1), 6))
    tokens = draw(st.integers(fewest, 20))
    options = {}
    if "top_k" in gate_options(router):
        options["top_k"] = draw(st.integers(1, num_experts))
    if "capacity_factor" in gate_options(router) and router != "expert_choice":
        options["capacity_factor"] = float("inf") if dropless else draw(st.sampled_from([0.5, 1.0, float("inf")]))
    if "capacity_policy" in gate_options(router):
        options["capacity_policy"] = draw(st.sampled_from(POLICIES))
    if "eval_capacity_factor" in gate_options(router) and not dropless:
        options["eval_capacity_factor"] = draw(st.sampled_from([None, 0.5, 1.0]))
    if router == "gshard":
        options["second_expert_policy"] = draw(st.sampled_from(SECOND_EXPERT))
        options["normalise_before_dropping"] = draw(st.booleans())
    torch.manual_seed(draw(st.integers(0, 2**20)))
    gate = build_gate(router, 5, num_experts, **options).train(draw(st.booleans()))
    torch.nn.init.normal_(gate.projection.weight)  # some start at zero, where all logits are equal
    kind = draw(st.sampled_from(["none", "some", "all"]))
    padding = {"none": None, "some": torch.rand(tokens) < 0.4, "all": torch.ones(tokens, dtype=torch.bool)}[kind]
    return gate, torch.randn(tokens, 5), padding


def matrix(routing):
    """[S, E]: the weight of each expert for each token."""
    weights = torch.zeros(len(routing.expert_index), routing.num_experts)
    return weights.scatter_add(1, routing.expert_index, routing.combine_weight.detach())


def routed(routing):
    unrouted = routing.unrouted()
    return torch.ones_like(routing.expert_index, dtype=torch.bool) if unrouted is None else ~unrouted


@pytest.mark.parametrize("router", sorted(GATES))
def test_routing_is_well_formed(router):
    @few
    @given(cases(router))
    def holds(case):
        gate, tokens, padding = case
        routing = gate(tokens, padding)
        index, weight = routing.expert_index, routing.combine_weight
        assert index.dtype == torch.int64 and index.shape == weight.shape and len(index) == len(tokens)
        assert weight.dtype == torch.float32 and weight.isfinite().all()
        assert (weight >= 0).all() and (router in UNBOUNDED or (weight <= 1).all())
        assert ((index >= 0) & (index < gate.num_experts)).all()
        assert all(len(set(row)) == len(row) for row in index.tolist())
        assert (weight[~routed(routing)] == 0).all()
        if padding is not None:
            assert not routed(routing)[padding].any() and (matrix(routing)[padding] == 0).all()
        real = len(tokens) if padding is None else (~padding).sum().item()
        sums = routing.statistics()
        assert sums["tokens"].item() == real and sums["load"].sum() <= real * index.size(1)
        if gate.current_capacity_factor is not None:
            most = gate.current_capacity_factor * index.size(1) * real / gate.num_experts
            assert sums["load"].sum(0).max().item() < most + 1
        if not gate.training and gate.causal:
            assert routing.dropped is None
        for loss in routing.aux_losses.values():
            assert loss.shape == () and loss.isfinite() and loss >= 0
            if real == 0:
                assert loss == 0

    holds()


@pytest.mark.parametrize("router", sorted(set(GATES) - MAYBE_NONE))
def test_without_a_capacity_every_token_gets_weight_and_the_gradients_are_finite(router):
    @few
    @given(cases(router, dropless=True))
    def holds(case):
        gate, tokens, padding = case
        routing = gate(tokens, padding)
        real = torch.ones(len(tokens), dtype=torch.bool) if padding is None else ~padding
        assert torch.equal(routing.combine_weight.sum(1) > 0, real)
        if router not in ("hash", "round_robin"):  # they have no gradient
            (routing.combine_weight.sum() + sum(routing.aux_losses.values())).backward()
            assert gate.projection.weight.grad.isfinite().all()

    holds()


def fix_noise(gate, num_tokens, order):
    """Make the gate draw the same noise each time, with rows in the given order."""
    if not hasattr(gate, "draw_noise"):
        return

    def rearranged(noise):
        if isinstance(noise, list):
            return [rearranged(one) for one in noise]
        if isinstance(noise, tuple):  # std comes from the caller, already in that order
            return noise._replace(**{name: value[order] for name, value in noise._asdict().items() if name != "std"})
        return noise if noise is None else noise[order]

    draw = type(gate).draw_noise

    def fixed(argument):
        torch.manual_seed(3)
        return rearranged(draw(gate, argument))

    gate.draw_noise = fixed


@pytest.mark.parametrize("router", sorted(set(GATES) - {"round_robin"}))  # it routes by the place in the batch
def test_reordering_tokens_reorders_their_routing(router):
    @few
    @given(cases(router, dropless=True, fewest=1), st.randoms(use_true_random=False))
    def holds(case, random):
        gate, tokens, padding = case
        order = list(range(len(tokens)))
        random.shuffle(order)
        fix_noise(gate, len(tokens), list(range(len(tokens))))
        straight = gate(tokens, padding)
        fix_noise(gate, len(tokens), order)
        shuffled = gate(tokens[order], None if padding is None else padding[order])
        if router == "base" and gate.training:  # the auction depends on the order, but its total is near the optimum
            real = torch.ones(len(tokens)) if padding is None else (~padding).float()
            scores = gate.logits(tokens)
            totals = [
                (scores.gather(1, straight.expert_index).squeeze(1) * real).sum(),
                (scores[order].gather(1, shuffled.expert_index).squeeze(1) * real[order]).sum(),
            ]
            assert (totals[0] - totals[1]).abs() <= len(tokens) * scores.abs().max() / 25 + 1e-5
            return
        torch.testing.assert_close(matrix(shuffled), matrix(straight)[order], rtol=1e-4, atol=1e-5)
        for name, loss in straight.aux_losses.items():
            torch.testing.assert_close(shuffled.aux_losses[name], loss, rtol=1e-4, atol=1e-5)

    holds()


@pytest.mark.parametrize("router", sorted(GATES))
def test_the_same_seed_gives_the_same_routing(router):
    gate, tokens = build_gate(router, 5, 4), torch.randn(30, 5)
    runs = []
    for _ in range(2):
        torch.manual_seed(11)
        runs.append(gate(tokens))
    assert torch.equal(runs[0].expert_index, runs[1].expert_index)
    assert torch.equal(runs[0].combine_weight, runs[1].combine_weight)


@pytest.mark.parametrize("router", sorted(GATES))
def test_activation_checkpointing_recomputes_the_same_routing(router):
    layer = build_moe_layer(router, 5, 8, 4)
    plain = copy.deepcopy(layer)
    torch.nn.init.normal_(layer.gate.projection.weight)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(30, 5)
    torch.manual_seed(11)
    plain(x).square().sum().backward()
    torch.manual_seed(11)
    output = checkpoint(layer, x, use_reentrant=False)
    first = layer.routing
    output.square().sum().backward()
    assert layer.routing is not first  # it ran again
    assert torch.equal(layer.routing.expert_index, first.expert_index)
    assert torch.equal(first.expert_index, plain.routing.expert_index)
    for ours, reference in zip(layer.parameters(), plain.parameters()):
        assert (ours.grad is None) == (reference.grad is None)
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, reference.grad)


@pytest.mark.parametrize("router", sorted(GATES))
def test_collapsed_single_token_and_empty_batches_are_routed(router):
    gate = build_gate(router, 5, 4)
    logits = torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1)
    for rows in (8, 1, 0):
        for training in (True, False):
            routing = gate.train(training).route(logits[:rows])
            assert routing.expert_index.size(0) == rows and routing.combine_weight.isfinite().all()
            if not training and rows and gate.causal:
                assert (routing.expert_index[:, 0] == 0).all()
            routing.to_fairscale()


@pytest.mark.parametrize("router", sorted(name for name, gate in GATES.items() if gate.causal))
def test_at_inference_a_tokens_routing_does_not_depend_on_its_batch(router):
    gate = build_gate(router, 5, 4).eval()
    torch.nn.init.normal_(gate.projection.weight)
    tokens = torch.randn(12, 5)
    together = matrix(gate(tokens))
    alone = torch.cat([matrix(gate(token.unsqueeze(0))) for token in tokens])
    torch.testing.assert_close(together, alone)
