"""--balance-scope in fairseq-train; tests/distributed/test_fairseq_train.py compares it with a whole batch."""

from types import SimpleNamespace

import pytest
import torch
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates.balance_scope import Update
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.plugin.balance import set_balance_scope


def test_an_unknown_balance_scope_is_refused():
    cfg = SimpleNamespace(model=SimpleNamespace(balance_scope="everywhere"))
    with pytest.raises(ConfigurationError, match="scope everywhere is unknown; choose sequence, local, global or update"):
        set_balance_scope(cfg, task=None, model=torch.nn.Linear(1, 1), timeout=None)


def test_counting_ahead_sees_the_samples_dropout_and_drops_of_the_training(train, monkeypatch):
    """Both passes route alike: the balance loss of every micro-batch is that of the routings of the whole update."""
    routings, forward = [], AuxiliaryLosses.forward

    def recorded(self, model, sample, reduce=True):
        result = forward(self, model, sample, reduce)
        if model.training and torch.is_grad_enabled():
            routings.append([layer.routing for layer in moe_layers(model)])
        return result

    monkeypatch.setattr(AuxiliaryLosses, "forward", recorded)
    flags = "--router sparsemixer --dropout 0.3 --capacity-factor 1.0 --update-freq 2 --max-update 2 --balance-scope update"
    train(*flags.split())
    assert len(routings) == 4
    for first in (0, 2):
        for parts in zip(*routings[first : first + 2]):  # of one layer
            real = [~routing.padding_mask for routing in parts]
            index = torch.cat([routing.expert_index[mask] for routing, mask in zip(parts, real)])
            probabilities = torch.cat([routing.probabilities[mask] for routing, mask in zip(parts, real)])
            share = torch.bincount(index.flatten(), minlength=4) / len(index)
            expected = 4 * (share * probabilities.mean(0)).sum().item()
            assert [r.aux_losses["balance"].item() for r in parts] == pytest.approx([expected] * 2, rel=1e-5)


def test_a_router_without_a_balance_loss_takes_any_scope(train):
    for scope in ("update", "sequence"):
        train("--router", "hash", "--update-freq", "2", "--max-update", "2", "--balance-scope", scope)


def test_with_skipped_layers_the_budget_loss_is_still_that_of_the_whole_update(train, monkeypatch):
    """LayerDrop skips layers of a micro-batch, or all that have experts; --moe-cmr's budget is over those that ran."""
    gates, losses, forward = [], [], AuxiliaryLosses.forward

    def recorded(self, model, sample, reduce=True):
        loss, size, log = forward(self, model, sample, reduce)
        if model.training and torch.is_grad_enabled():
            ran = [layer.routing for layer in moe_layers(model) if layer.routing is not None]
            gates.append([routing.cmr_gate[~routing.padding_mask] for routing in ran])
            losses.append(log["moe/aux/cmr"].item() / size)
        return loss, size, log

    monkeypatch.setattr(AuxiliaryLosses, "forward", recorded)
    flags = "--moe-cmr --encoder-layers 4 --decoder-layers 1 --moe-freq 1 --encoder-layerdrop 0.5 --moe-encoder-only"
    train(*flags.split(), *"--update-freq 2 --max-update 6 --balance-scope update".split())
    assert len({len(each) for each in gates}) > 1 and len(gates) == 12
    for first in range(0, 12, 2):
        pair = gates[first : first + 2]
        expected = abs(torch.cat([gate for each in pair for gate in each]).mean().item() - 0.8)
        for each, loss in zip(pair, losses[first : first + 2]):
            assert loss == pytest.approx(expected if each else 0, rel=1e-4)


def test_a_batch_in_which_no_layer_with_experts_ran_leaves_the_sums_alone(train):
    flags = "--encoder-moe-layers 0 --moe-encoder-only --encoder-layers 2 --encoder-layerdrop 0.6"
    train(*flags.split(), *"--update-freq 2 --max-update 8 --balance-scope update".split())


def test_a_criterion_without_balance_losses_pays_for_no_counting(train, monkeypatch):
    counted = []
    monkeypatch.setattr(Update, "start_counting", lambda self: counted.append(self))
    train("--criterion", "cross_entropy", "--update-freq", "2", "--max-update", "1", "--balance-scope", "update")
    assert not counted
