"""NLLB's regularisers in fairseq-train on two ranks: one coin for all, masks of their own, portable checkpoints."""

from pathlib import Path
from typing import Any, Dict, List
from unittest.mock import patch

import pytest
import runs
import torch
from ranks import free_port, rank_number, run_ranks
from runs import initialised

from fairseq_sparsemixer.moe import layer as core
from fairseq_sparsemixer.moe.gating_dropout import stays_on_rank
from fairseq_sparsemixer.moe.layer import MoELayer

pytestmark = pytest.mark.distributed

ALL = "--moe-eom 0.2 --moe-fom 0.1 --moe-gating-dropout 0.4 --moe-cmr --moe-cmr-gate-dropout 0.2".split()


@pytest.fixture(scope="module")
def five_batches(tmp_path_factory) -> Path:
    """20 sentences: 5 batches of 4, so that in the last update the second of two ranks has no batch."""
    return runs.make_corpus(tmp_path_factory.mktemp("corpus"), sentences=20)


def train(
    data: Path, folder: Path, flags: List[str], updates: int, ranks: int = 1, rank: int = 0, port: int = 0
) -> Dict[str, Any]:
    """Train. The losses; (in training, stays on the rank, idle) of each forward of a layer; the first mask of outputs."""
    forwards, masks = [], []
    forward, mask_output = MoELayer.forward, core.mask_output

    def watched(self, x, padding_mask=None, token_ids=None):
        forwards.append((self.training, self.stay_on_rank, self.idle))
        return forward(self, x, padding_mask, token_ids)

    def masked(output, probability, training):
        result = mask_output(output, probability, training)
        if training and probability and not len(masks):
            masks.append((result != 0).any(-1))
        return result

    with patch.object(MoELayer, "forward", watched), patch.object(core, "mask_output", masked):
        losses = runs.train(
            data, folder, "--required-batch-size-multiple", 1, *flags, updates=updates, ranks=ranks, rank=rank, port=port
        )
    return {"losses": losses, "forwards": forwards, "masks": masks}


def train_rank(data: Path, folder: Path, flags: List[str], updates: int, port: int) -> Dict[str, Any]:
    return train(data, folder, flags, updates, 2, rank_number(), port)


def on_two_ranks(data: Path, folder: Path, *flags: str, updates: int) -> List[Dict[str, Any]]:
    return run_ranks(2, train_rank, data, folder, list(flags), updates, free_port(), group=False)


def test_every_rank_and_layer_tosses_the_same_coin_for_a_batch(five_batches, tmp_path):
    """With --update-freq 2 an epoch is one update of 2 + 2 batches, and one whose last batch only the first rank has."""
    flags = ["--moe-gating-dropout", "0.5", "--update-freq", "2", "--checkpoint-activations"]
    results = on_two_ranks(five_batches, tmp_path / "run", *flags, updates=8)
    coins, idle = ([[forward[place] for forward in result["forwards"]] for result in results] for place in (1, 2))
    assert coins[0] == coins[1] and len(set(coins[0])) == 2
    assert not any(idle[0]) and any(idle[1])
    per_update = [2 if update % 2 == 0 else 1 for update in range(8)]  # batches
    expected = [stays_on_rank(0.5, 1, update, batch) for update, count in enumerate(per_update) for batch in range(count)]
    layers = 3  # each runs twice for a batch: again in the backward pass, for --checkpoint-activations
    assert coins[0] == [coin for coin in expected for _ in range(2 * layers)]


def test_counting_an_update_ahead_tosses_the_coins_of_the_training_that_follows(five_batches, tmp_path):
    flags = ["--moe-gating-dropout", "0.5", "--update-freq", "2", "--balance-scope", "update"]
    results = on_two_ranks(five_batches, tmp_path / "run", *flags, updates=7)
    coins = [[stay for _, stay, _ in result["forwards"]] for result in results]
    batches = [[stays_on_rank(0.5, 1, update, batch) for batch in range(2 if update % 2 == 0 else 1)] for update in range(7)]
    passes = [coin for update in batches for coin in update * (2 if len(update) > 1 else 1)]  # one batch needs no counting
    assert coins[0] == coins[1] == [coin for coin in passes for _ in range(3)]


def test_validation_never_stays_on_the_rank_and_a_resumed_run_tosses_the_same_coins(five_batches, tmp_path):
    flags = ["--moe-gating-dropout", "0.6"]
    whole = on_two_ranks(five_batches, tmp_path / "whole", *flags, updates=6)[0]
    on_two_ranks(five_batches, tmp_path / "parts", *flags, updates=2)
    rest = on_two_ranks(five_batches, tmp_path / "parts", *flags, updates=6)[0]
    assert rest["losses"] == whole["losses"][2:] and rest["forwards"] == whole["forwards"][-len(rest["forwards"]) :]
    for result in run_ranks(2, train_validating, five_batches, tmp_path / "valid", free_port(), group=False):
        stayed = {training: any(stay for mode, stay, _ in result["forwards"] if mode is training) for training in (True, False)}
        assert stayed == {True: True, False: False}


def train_validating(data: Path, folder: Path, port: int) -> Dict[str, Any]:
    with patch.object(runs, "SMALL", [flag for flag in runs.SMALL if flag != "--disable-validation"]):
        return train_rank(data, folder, ["--moe-gating-dropout", "0.9", "--validate-interval-updates", "2"], 4, port)


def test_ranks_draw_masks_of_their_own(five_batches, tmp_path):
    first, second = (result["masks"][0] for result in on_two_ranks(five_batches, tmp_path, "--moe-fom", "0.5", updates=1))
    count = min(len(first), len(second))
    assert count > 8 and not torch.equal(first[:count], second[:count])


def test_two_ranks_with_conditional_routing_equal_one_process(five_batches, tmp_path):
    """Without random masks. One process accumulates the batches of both ranks."""
    flags = ["--moe-cmr", "--moe-cmr-budget", "0.9", "--moe-cmr-loss-weight", "2"]
    alone = train(five_batches, tmp_path / "one", [*flags, "--update-freq", "2"], updates=6)
    both = on_two_ranks(five_batches, tmp_path / "two", *flags, updates=6)
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert_same_weights(tmp_path, "one", "two")


def assert_same_weights(folder: Path, *names: str) -> None:
    """Of two checkpoints with CMR, but for rounding."""
    states = [torch.load(folder / name / "checkpoint_last.pt")["model"] for name in names]
    assert states[0].keys() == states[1].keys() and any(".cmr.gate.weight" in name for name in states[0])
    for name, value in initialised(states[0]).items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding error
            difference = (states[1][name] - value).abs().max()
            assert difference <= 5e-5 * value.abs().max() + 1e-7, f"{name}: {difference}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_budget_loss_of_an_update_is_that_of_its_whole_batch(ranks, tmp_path):
    data, flags = runs.make_corpus(tmp_path, sentences=8), ["--moe-cmr", "--moe-cmr-budget", "0.9", "--moe-cmr-loss-weight", "2"]
    train(data, tmp_path / "whole", [*flags, "--batch-size", "8"], updates=3)
    split = [*flags, "--batch-size", "2", "--update-freq", str(4 // ranks), "--balance-scope", "update"]
    if ranks == 1:
        train(data, tmp_path / "split", split, updates=3)
    else:
        on_two_ranks(data, tmp_path / "split", *split, updates=3)
    assert_same_weights(tmp_path, "whole", "split")


@pytest.mark.parametrize("scope", ["global", "update"])
def test_checkpoints_with_everything_fit_any_number_of_ranks(scope, five_batches, tmp_path):
    on_two_ranks(five_batches, tmp_path / "run", *ALL, "--balance-scope", scope, updates=2)
    torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=True)
    lines = runs.generate(five_batches, tmp_path / "run" / "checkpoint_last.pt", tmp_path / "generated")
    assert len(lines) == 8
    assert len(train(five_batches, tmp_path / "run", [*ALL, "--balance-scope", scope], updates=4)["losses"]) == 2
    for result in on_two_ranks(five_batches, tmp_path / "run", *ALL, "--balance-scope", scope, updates=6):
        assert len(result["losses"]) == 2
