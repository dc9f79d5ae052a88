"""GShard's gate, compared with fairscale's top2gating with the same noise."""

import math

import pytest
import torch
from fairscale.nn.moe import top2gate

from fairseq_sparsemixer import build_gate
from fairseq_sparsemixer.moe.gates.gshard import gshard_routing


@pytest.mark.parametrize("tokens, num_experts", [(8, 2), (24, 4), (64, 8), (12, 12)])
def test_routing_loss_and_gradient_equal_fairscales(monkeypatch, tokens, num_experts):
    gate = build_gate("gshard", 6, num_experts)
    logits = torch.randn(tokens, num_experts)
    logits[:, 0] += 1.5  # so that some are dropped
    gumbel = gate.draw_noise(logits)
    monkeypatch.setattr(gate, "draw_noise", lambda logits: gumbel)
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: gumbel)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    routing = gate.route(ours)
    assert routing.dropped.any() == (num_experts > 2)  # with two experts, each gets every token
    capacity = 2 * tokens // num_experts
    results = [routing.to_fairscale(capacity), top2gate.top2gating(theirs)]
    for mine, reference in zip(*results):
        torch.testing.assert_close(mine, reference)
    upstream = torch.randn(tokens, num_experts, capacity)
    for l_aux, combine, _ in results:
        ((combine * upstream).sum() + 3 * l_aux).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_second_expert_is_sampled_in_proportion_to_its_weight():
    gate = build_gate("gshard", 6, 4)
    row = torch.tensor([2.0, 1.0, 0.0, -1.0])
    routing = gate.decide(row.repeat(30000, 1))
    assert (routing.expert_index[:, 0] == 0).all()
    share = torch.bincount(routing.expert_index[:, 1], minlength=4) / 30000
    torch.testing.assert_close(share, torch.cat([torch.zeros(1), row[1:].softmax(0)]), atol=0.015, rtol=0)


def test_inference_uses_the_two_most_probable_experts_with_normalised_weights():
    logits = torch.randn(20, 5, dtype=torch.float64)
    routing = build_gate("gshard", 6, 5).eval().route(logits)
    for s, row in enumerate(logits.tolist()):
        best = sorted(range(5), key=lambda e: -row[e])[:2]
        assert routing.expert_index[s].tolist() == best
        first = 1 / (1 + 2.718281828459045 ** (row[best[1]] - row[best[0]]))
        assert routing.combine_weight[s].tolist() == pytest.approx([first, 1 - first])


def test_the_gradient_of_the_weights_is_exact():
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    gumbel = torch.randn(5, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gshard_routing(x, gumbel=gumbel).combine_weight, logits)


def test_at_least_two_experts_are_required():
    with pytest.raises(ValueError, match="num_experts=1 must be at least 2"):
        build_gate("gshard", 6, 1)


def reference(row, policy, coin, normalise_first, room):
    """{expert: weight} of one token without noise; room: whether each of its two experts has any."""
    total = sum(math.exp(x) for x in row)
    pi = [math.exp(x) / total for x in row]
    best = sorted(range(len(row)), key=lambda e: -pi[e])[:2]
    both = pi[best[0]] + pi[best[1]]
    second = pi[best[1]] / both if normalise_first else pi[best[1]]
    kept = [room[0], room[1] and (policy == "all" or coin < 2 * second)]
    denominator = both if normalise_first else sum(pi[e] for e, keep in zip(best, kept) if keep)
    return {e: pi[e] / denominator for e, keep in zip(best, kept) if keep}


@pytest.mark.parametrize("policy", ["all", "random"])
@pytest.mark.parametrize("normalise_first", [False, True])
@pytest.mark.parametrize("factor", [0.5, float("inf")])
def test_the_second_experts_policy_and_the_order_of_normalising_equal_the_formula(monkeypatch, policy, normalise_first, factor):
    options = {"second_expert_policy": policy, "normalise_before_dropping": normalise_first, "capacity_factor": factor}
    gate = build_gate("gshard", 6, 4, **options)
    logits, coins = torch.randn(40, 4, dtype=torch.float64), torch.rand(40, dtype=torch.float64)
    logits[:, 0] += 1
    padding = torch.arange(40) % 7 == 0
    monkeypatch.setattr(gate, "draw_noise", lambda logits: coins if policy == "random" else None)
    routing = gate.route(logits, padding)
    dropped = torch.zeros(40, 2, dtype=torch.bool) if routing.dropped is None else routing.dropped
    assert dropped.any() == (factor == 0.5)
    for token, row in enumerate(logits.tolist()):
        room = (~dropped[token]).tolist()
        expected = {} if padding[token] else reference(row, policy, coins[token].item(), normalise_first, room)
        pairs = zip(routing.expert_index[token].tolist(), routing.combine_weight[token].tolist())
        assert {expert: weight for expert, weight in pairs if weight} == pytest.approx(expected, rel=1e-12)


def test_skipped_second_choices_take_no_capacity_and_are_not_dropped():
    gate = build_gate("gshard", 6, 2, capacity_factor=0.5, second_expert_policy="random")
    logits = torch.tensor([[9.0, 0.0]]).repeat(3, 1).double()  # a second weight of about 1e-4, never kept with these coins
    logits = torch.cat([logits, -logits[:1]])  # room for two choices an expert; the last token's first choice is expert 1
    torch.manual_seed(0)
    routing = gate.route(logits)
    assert routing.dropped.tolist() == [[False, False], [False, False], [True, False], [False, False]]
    sums = routing.statistics()
    assert sums["load"].tolist() == [[2, 1]] and sums["chosen"].tolist() == [[3, 1]] and sums["dropped"].tolist() == [1]


def test_random_keeps_the_second_expert_with_twice_its_weight_as_the_probability():
    gate = build_gate("gshard", 6, 3, capacity_factor=float("inf"), second_expert_policy="random", normalise_before_dropping=True)
    probabilities = torch.tensor([0.6, 0.2, 0.2 - 1e-6])
    routing = gate.route(probabilities.log().repeat(20000, 1))
    kept = 1 - routing.skipped[:, 1].double().mean().item()
    assert kept == pytest.approx(2 * 0.2 / 0.8, abs=0.02)  # 5.6 standard deviations
    assert gate.eval().route(probabilities.log().view(1, 3)).skipped is None


def test_an_unknown_policy_of_the_second_expert_is_refused():
    with pytest.raises(ValueError, match="second_expert_policy=none is unknown; choose from sampling, all, random"):
        build_gate("gshard", 6, 4, second_expert_policy="none")
