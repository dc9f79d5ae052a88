"""The checkpointing trainer: the position in an epoch, and settings refused before training."""

from types import SimpleNamespace

import pytest
import runs
import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import read_checkpoint
from fairseq_sparsemixer.plugin.checkpointing_trainer import resume_between_same_batches
from fairseq_sparsemixer.plugin.refusals import refuse_incompatible, refuse_writing_in_place

PLACES = [(2, 3, 1, 6), (1, 6, 2, 3), (4, 2, 2, 4), (1, 5, 2, 2), (2, 0, 1, 0), (2, 3, 2, 3)]


@pytest.mark.parametrize("written_by, done, now, position", PLACES)
def test_the_position_in_an_epoch_is_counted_in_batches_of_all_ranks(written_by, done, now, position):
    state = {
        "cfg": {"distributed_training": {"distributed_world_size": written_by}},
        "extra_state": {"train_iterator": {"iterations_in_epoch": done}},
    }
    resume_between_same_batches(state, now)
    assert state["extra_state"]["train_iterator"]["iterations_in_epoch"] == position


def test_writing_in_place_is_refused():
    with pytest.raises(ConfigurationError, match="--write-checkpoints-asynchronously leaves a truncated file"):
        refuse_writing_in_place(SimpleNamespace(checkpoint=SimpleNamespace(write_checkpoints_asynchronously=True)))


OPTIMIZERS = [{"_name": "adafactor"}, {"_name": "composite"}, {"_name": "adam", "fp16_adam_stats": True}]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizers_with_state_that_cannot_be_sharded_are_refused(optimizer):
    cfg = SimpleNamespace(
        distributed_training=SimpleNamespace(ddp_backend="legacy_ddp", zero_sharding="none"),
        optimization=SimpleNamespace(use_bmuf=False),
        model=SimpleNamespace(),
        task=SimpleNamespace(),
        optimizer=SimpleNamespace(**optimizer),
    )
    with pytest.raises(ConfigurationError, match="use --expert-parallel-size 1"):
        refuse_incompatible(cfg, 2)


def test_a_refused_run_removes_nothing_and_another_layout_keeps_staged_files(corpus, tmp_path):
    run = tmp_path / "run"
    runs.train(corpus, run, updates=1)
    (run / "checkpoint_last-rank-1.pt.staged").write_bytes(b"needed to finish the save")
    (run / "checkpoint_best.pt.1-00000000.tmp").write_bytes(b"PK")
    (run / "checkpoint_last.pt").rename(run / "checkpoint_last-rank-0.pt")
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigurationError, match="is a sharded checkpoint .* --sharded-checkpoints"):
        runs.train(corpus, run, updates=2)
    assert sorted(path.name for path in run.iterdir()) == before
    (run / "checkpoint_last-rank-0.pt").rename(run / "checkpoint_last.pt")
    assert len(runs.train(corpus, run, updates=2)) == 1
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint_last-rank-1.pt.staged", "checkpoint_last.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("precise", [[], ["--ema-fp32"]])
def test_an_average_starts_as_the_weights_of_a_checkpoint_without_one(precise, corpus, tmp_path):
    plain = tmp_path / "plain" / "checkpoint_last.pt"
    runs.train(corpus, plain.parent, updates=1)
    flags = ["--finetune-from-model", plain, "--store-ema", "--ema-decay", "0.75", *precise]
    runs.train(corpus, tmp_path / "averaged", *flags, updates=1)
    before, after = (read_checkpoint(str(path)) for path in (plain, tmp_path / "averaged" / "checkpoint_last.pt"))
    averaged = after["extra_state"]["ema"]
    for name, start in before["model"].items():
        if name.endswith("weight_in") or name.endswith("fc2.weight"):
            assert not torch.equal(start, after["model"][name])
            torch.testing.assert_close(averaged[name], 0.75 * start + 0.25 * after["model"][name])
