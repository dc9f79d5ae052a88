"""trainer.py: the settings that MoETrainer refuses, and its installation. tests/distributed tests its training."""

import sys
from types import ModuleType, SimpleNamespace

import fairseq_cli.train
import pytest
import torch
from fairseq.trainer import Trainer

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.refusals import refuse_incompatible, refuse_training_apart, refuse_unsliceable
from fairseq_sparsemixer.plugin.trainer import MoETrainer, install


def configuration(ddp_backend="legacy_ddp", zero_sharding="none", use_bmuf=False, tpu=False, optimizer=None):
    return SimpleNamespace(
        distributed_training=SimpleNamespace(ddp_backend=ddp_backend, zero_sharding=zero_sharding),
        optimization=SimpleNamespace(use_bmuf=use_bmuf),
        common=SimpleNamespace(tpu=tpu),
        optimizer=SimpleNamespace(**{"_name": "adam", **(optimizer or {})}),
    )


@pytest.mark.parametrize("backend", ["legacy_ddp", "no_c10d", "pytorch_ddp", "c10d"])
def test_plain_data_parallelism_is_accepted(backend):
    refuse_incompatible(configuration(backend), size=2)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(ddp_backend="fully_sharded"), "--ddp-backend fully_sharded"),
        (dict(ddp_backend="slowmo"), "--ddp-backend slowmo"),
        (dict(zero_sharding="os"), "--zero-sharding os"),
        (dict(use_bmuf=True), "--use-bmuf"),
    ],
)
def test_settings_that_assume_identical_ranks_are_refused_with_the_remedy(options, sentence):
    with pytest.raises(ConfigurationError, match=f"{sentence} .*--expert-parallel-size 1"):
        refuse_incompatible(configuration(**options), size=2)


@pytest.mark.parametrize("name", ["adam", "adamax", "adagrad", "adadelta", "nag", "sgd"])
def test_optimizers_that_update_each_number_by_itself_update_slices(name):
    refuse_unsliceable(configuration(optimizer={"_name": name}))


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(ddp_backend="fully_sharded"), "--ddp-backend fully_sharded does not keep"),
        (dict(zero_sharding="os"), "--zero-sharding os already shards"),
        (dict(use_bmuf=True), "--use-bmuf averages"),
        (dict(tpu=True), "--tpu averages"),
        (dict(optimizer={"_name": "adafactor"}), "--optimizer adafactor is not known to .* use adam, .* or sgd,"),
        (dict(optimizer={"_name": "of_a_user"}), "--optimizer of_a_user is not known to"),
        (dict(optimizer={"fp16_adam_stats": True}), "--fp16-adam-stats scales state by whole tensors"),
    ],
)
def test_settings_that_cannot_update_slices_are_refused_with_the_remedy(options, sentence):
    with pytest.raises(ConfigurationError, match=f"{sentence}.* or leave out --shard-expert-optimizer$"):
        refuse_unsliceable(configuration(**options))


def test_torchrun_ranks_that_fairseq_would_train_separately_are_refused(monkeypatch):
    for name, value in dict(MASTER_ADDR="node1", MASTER_PORT="1", RANK="1", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    refuse_training_apart()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="torchrun started 2 ranks .* add --distributed-world-size 2"):
        refuse_training_apart()


def test_fairseq_train_builds_this_trainer():
    assert fairseq_cli.train.Trainer is MoETrainer


@pytest.mark.parametrize("name", ["__main__", "__mp_main__"])
def test_fairseq_train_as_a_script_and_in_spawned_processes_builds_this_trainer(name, monkeypatch):
    module = ModuleType(name)
    module.Trainer = Trainer
    monkeypatch.setitem(sys.modules, name, module)
    install()
    assert module.Trainer is MoETrainer


@pytest.mark.parametrize("waits, given, handed", [(False, False, False), (False, True, True), (True, False, True)])
@pytest.mark.parametrize("step", ["train_step", "valid_step"])
def test_a_rank_out_of_memory_ends_the_run_if_others_wait_for_it(step, waits, given, handed, monkeypatch):
    """For experts on other ranks, or for the sums of --balance-scope global and update."""
    seen = []
    monkeypatch.setattr(Trainer, step, lambda self, batch, raise_oom=False: seen.append(raise_oom))
    trainer = MoETrainer.__new__(MoETrainer)
    trainer.cfg = SimpleNamespace(distributed_training=SimpleNamespace(distributed_world_size=1))
    trainer.expert_group, trainer.ranks_wait = None, waits
    getattr(trainer, step)([], given)
    assert seen == [handed]


@pytest.mark.parametrize("layers, differ", [([object()], True), ([], False)])
def test_ranks_draw_different_noise_if_the_model_has_experts(layers, differ):
    def drawn(rank):
        on_rank = type("OnRank", (MoETrainer,), {"data_parallel_rank": rank})
        trainer = on_rank.__new__(on_rank)
        trainer.cfg = SimpleNamespace(common=SimpleNamespace(seed=7))
        trainer.moe_layers, trainer._num_updates = layers, 3
        trainer._set_seed()
        return torch.rand(8)

    assert torch.equal(drawn(0), torch.rand(8, generator=torch.Generator().manual_seed(10)))  # the same as in one process
    assert torch.equal(drawn(0), drawn(1)) is not differ
    assert torch.equal(drawn(1), drawn(1)) and torch.equal(drawn(1), drawn(2)) is not differ


@pytest.mark.parametrize("cpu, error, raised", [
    (True, "DistributedDataParallel device_ids and output_device only work with GPU modules", ConfigurationError),
    (False, "DistributedDataParallel device_ids and output_device only work with GPU modules", ValueError),
    (True, "something else", ValueError),
])  # fmt: skip
def test_a_backend_that_needs_gpus_is_refused_on_a_cpu(cpu, error, raised, monkeypatch):
    def wrapped(trainer):
        raise ValueError(error)

    monkeypatch.setattr(Trainer, "model", property(wrapped))
    trainer = MoETrainer.__new__(MoETrainer)
    trainer.cfg = configuration("pytorch_ddp")
    trainer.cfg.common.cpu = cpu
    with pytest.raises(raised) as caught:
        trainer.model  # noqa: B018  # a property
    assert type(caught.value) is raised
    if raised is ConfigurationError:
        sentence = "--ddp-backend pytorch_ddp needs GPUs, but --cpu is given; use --ddp-backend legacy_ddp"
        assert caught.value.message == sentence
