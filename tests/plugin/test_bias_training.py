"""The selection bias in fairseq's training loop: one step per update, from the loads of all micro-batches."""

import pytest
import torch
from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses

from fairseq_sparsemixer.moe.gates.bias import SelectionBias
from fairseq_sparsemixer.moe.layer import MoELayer


@pytest.mark.parametrize("flags", [(), ("--checkpoint-activations",)], ids=["plain", "recomputed"])
def test_the_bias_steps_once_per_update_with_the_load_of_all_micro_batches(train, monkeypatch, tmp_path, flags):
    seen, steps = [], []  # per micro-batch: [layers, E]; per step and layer: [E]
    forward, step = AuxiliaryLosses.forward, SelectionBias.step

    def watched(self, model, sample, reduce=True):
        result = forward(self, model, sample, reduce)
        if model.training:
            layers = [module for module in model.modules() if isinstance(module, MoELayer)]
            seen.append(torch.stack([layer.routing.chosen_count().sum(0) for layer in layers]))
        return result

    def stepped(self, load):
        steps.append(load.clone())
        step(self, load)

    monkeypatch.setattr(AuxiliaryLosses, "forward", watched)
    monkeypatch.setattr(SelectionBias, "step", stepped)
    train("--router", "switch", "--moe-bias-update-rate", "0.125", "--update-freq", "2", "--batch-size", "2",
          "--max-update", "3", "--validate-interval-updates", "1", "--save-dir", tmp_path / "run", *flags)  # fmt: skip
    layers = seen[0].size(0)
    assert len(seen) == 6 and len(steps) == 3 * layers
    for update in range(3):
        expected = seen[2 * update] + seen[2 * update + 1]
        assert torch.equal(torch.stack(steps[update * layers : (update + 1) * layers]), expected)
    state = torch.load(tmp_path / "run" / "checkpoint_last.pt")["model"]
    saved = [value for name, value in state.items() if name.endswith("balancer.bias")]
    assert len(saved) == layers
    for index, bias in enumerate(saved):
        moves = [torch.sign(load.mean() - load) for load in steps[index::layers]]
        assert torch.equal(bias.cpu(), 0.125 * sum(moves))  # sums of eighths are exact
