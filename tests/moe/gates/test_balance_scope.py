"""Scopes of balance losses, compared with the loss of all their tokens in one float64 batch."""

import pytest
import torch

from fairseq_sparsemixer.moe.gates.balance_scope import SequenceScope, Update
from fairseq_sparsemixer.moe.gates.losses import balance_loss
from fairseq_sparsemixer.moe.gates.noisy_topk import noisy_topk_routing
from fairseq_sparsemixer.moe.gates.remoe import remoe_routing
from fairseq_sparsemixer.moe.gates.switch import switch_routing
from fairseq_sparsemixer.moe.layer import build_moe_layer

E = 4
LOSSES = {  # a router's balance losses, of logits [S, E] and padding [S]
    "switch": lambda logits, padding, scope: switch_routing(logits, padding, None, scope).aux_losses["balance"],
    "noisy_topk": lambda logits, padding, scope: sum(
        noisy_topk_routing(logits, padding, 2, None, scope).aux_losses[name] for name in ("importance", "load")
    ),
    "remoe": lambda logits, padding, scope: remoe_routing(logits, padding, 1, torch.tensor(2.0), scope).aux_losses["l1"],
}


def tokens(count):
    """logits [S, E] and padding [S]."""
    generator = torch.Generator().manual_seed(count)
    logits = torch.randn(count, E, dtype=torch.float64, generator=generator)
    return logits, torch.rand(count, generator=generator) < 0.3


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("sizes", [(5,), (3, 0, 8), (1, 1, 1)], ids=str)
def test_the_gradient_of_an_update_is_that_of_all_its_tokens_at_once(loss, sizes):
    logits, padding = tokens(sum(sizes))
    alone = logits.clone().requires_grad_()
    expected = loss(alone, padding, None)
    expected.backward()
    update = Update()
    scope = update.scope()
    update.start_counting()
    for part, mask in zip(logits.split(sizes), padding.split(sizes)):
        scope.restart(1)
        loss(part, mask, scope)
    update.finish_counting()
    together = logits.clone().requires_grad_()
    for part, mask in zip(together.split(sizes), padding.split(sizes)):
        scope.restart(1)
        found = loss(part, mask, scope)
        assert found.item() == pytest.approx(expected.item())
        found.backward()
    torch.testing.assert_close(together.grad, alone.grad)


def test_after_an_update_a_micro_batch_stands_alone():
    logits, padding = tokens(6)
    update = Update()
    scope = update.scope()
    update.start_counting()
    LOSSES["switch"](logits * 3, padding, scope)
    update.finish_counting()
    update.end()
    scope.restart(1)
    assert LOSSES["switch"](logits, padding, scope) == LOSSES["switch"](logits, padding, None)


def test_the_sample_size_of_an_update_leaves_out_idle_ranks():
    update = Update()
    scope = update.scope()
    update.start_counting()
    scope.total(torch.ones(1))
    assert [update.weigh(size, idle) for size, idle in ((3, False), (9, True), (4, False))] == [3, 9, 4]
    update.finish_counting()
    assert update.weigh(3, False) == 7
    update.end()
    assert update.weigh(3, False) == 3


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_of_sequences_the_loss_is_the_mean_of_their_losses(loss):
    logits, padding = tokens(5 * 3)  # [T, B] = [5, 3], flattened
    padding[1::3] = True  # the second has no tokens
    scope = SequenceScope()
    scope.restart(3)
    expected = [loss(logits[b::3], padding[b::3], None) for b in (0, 2)]
    torch.testing.assert_close(loss(logits, padding, scope), sum(expected) / 2)


def test_a_layer_tells_its_scope_how_many_sequences_there_are():
    layer = build_moe_layer("switch", 8, 16, E, jitter_eps=0.0)
    layer.gate.balance_scope = SequenceScope()
    x = torch.randn(5, 3, 8)
    layer(x)
    each = [balance_loss(layer.routing.probabilities[b::3], layer.routing.expert_index[b::3]) for b in range(3)]
    torch.testing.assert_close(layer.routing.aux_losses["balance"], sum(each) / 3)
    layer(x[:, 0])
    torch.testing.assert_close(layer.routing.aux_losses["balance"], each[0])
