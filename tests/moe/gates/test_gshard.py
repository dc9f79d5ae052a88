"""GShard's gate, compared with fairscale's top2gating with the same noise."""

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
