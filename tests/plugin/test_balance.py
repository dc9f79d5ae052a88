"""--balance-scope in fairseq-train; tests/distributed/test_fairseq_train.py compares it with a whole batch."""

from types import SimpleNamespace

import pytest
import torch
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses

from fairseq_sparsemixer.errors import ConfigurationError
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
