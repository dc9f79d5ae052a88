"""Checks before training with experts: each error names the flag, its value and the remedy."""

import os
from importlib.util import find_spec
from typing import Any

from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import LEGACY_DDP, PYTORCH_DDP

KEEP_ALL = "use --expert-parallel-size 1, which keeps all experts on every rank"  # remedies
ELEMENTWISE = "adam", "adamax", "adagrad", "adadelta", "nag", "sgd"  # fairseq's optimizers that update each number by itself
OWN_TOKENS = "use --balance-scope local, with --expert-parallel-size 1"


def refuse_training_apart() -> None:
    """Raise ConfigurationError if torchrun started several ranks but fairseq, which counts visible GPUs, saw only one."""
    started = os.environ.get("WORLD_SIZE", "")
    by_torchrun = started.isdigit() and all(name in os.environ for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    if by_torchrun and int(started) > 1 and not dist.is_initialized():
        raise ConfigurationError(
            f"torchrun started {started} ranks (WORLD_SIZE), but fairseq sees at most one GPU and would train each alone; add"
            f" --distributed-world-size {started}, or on a CPU use fairseq-sparsemixer launch"
        )


def refuse_missing_tpu(cfg: Any) -> None:
    """Raise ConfigurationError for --tpu without torch_xla."""
    if cfg.common.tpu and find_spec("torch_xla") is None:
        raise ConfigurationError("--tpu needs torch_xla, which is not installed; leave it out, --bf16 works on any device")


def refuse_incompatible(cfg: Any, size: int) -> None:
    """Raise ConfigurationError for fairseq options that assume the same parameters on every rank."""
    distributed, remedy = cfg.distributed_training, KEEP_ALL
    if distributed.ddp_backend not in LEGACY_DDP + PYTORCH_DDP:
        raise ConfigurationError(
            f"--ddp-backend {distributed.ddp_backend} averages or shards all parameters over ranks, but experts sharded over"
            f" {size} ranks differ; use legacy_ddp or pytorch_ddp, or {remedy}"
        )
    if distributed.zero_sharding != "none":
        raise ConfigurationError(
            f"--zero-sharding {distributed.zero_sharding} assigns every parameter's update to one rank, but experts sharded over"
            f" {size} ranks differ; {remedy}"
        )
    if cfg.optimization.use_bmuf:
        raise ConfigurationError(f"--use-bmuf averages models over ranks, but experts differ by rank; {remedy}")
    refuse_unshareable_state(cfg, remedy)


def refuse_unshareable_state(cfg: Any, remedy: str) -> None:
    """Raise ConfigurationError for optimizers that combine values across a tensor, of which a rank has only a shard."""
    optimizer = getattr(cfg.optimizer, "_name", None)
    if optimizer in ("adafactor", "lamb", "composite"):
        raise ConfigurationError(
            f"--optimizer {optimizer} uses statistics of whole tensors, but a rank has only a shard of the experts' tensors;"
            f" use adam, or {remedy}"
        )
    if getattr(cfg.optimizer, "fp16_adam_stats", False):
        raise ConfigurationError(f"--fp16-adam-stats scales state per rank, so it cannot be gathered; leave it out, or {remedy}")


def refuse_unsliceable(cfg: Any) -> None:
    """Raise ConfigurationError for options with which replicas of an expert cannot each update a slice of it."""
    distributed, optimizer = cfg.distributed_training, getattr(cfg.optimizer, "_name", None)
    remedy = "or leave out --shard-expert-optimizer"
    if distributed.ddp_backend not in LEGACY_DDP + PYTORCH_DDP:
        raise ConfigurationError(
            f"--ddp-backend {distributed.ddp_backend} does not keep the same experts on replicas, which"
            f" --shard-expert-optimizer needs; use legacy_ddp or pytorch_ddp, {remedy}"
        )
    if distributed.zero_sharding != "none":
        raise ConfigurationError(
            f"--zero-sharding {distributed.zero_sharding} already shards the optimizer state of all parameters; leave it out,"
            f" {remedy}"
        )
    if cfg.optimization.use_bmuf or cfg.common.tpu:
        flag = "--use-bmuf" if cfg.optimization.use_bmuf else "--tpu"
        raise ConfigurationError(f"{flag} averages over ranks what --shard-expert-optimizer shards; leave it out, {remedy}")
    if optimizer not in ELEMENTWISE:
        raise ConfigurationError(
            f"--optimizer {optimizer} is not known to update each number by itself, so it cannot update slices of experts; use"
            f" {', '.join(ELEMENTWISE[:-1])} or {ELEMENTWISE[-1]}, {remedy}"
        )
    if getattr(cfg.optimizer, "fp16_adam_stats", False):
        raise ConfigurationError(f"--fp16-adam-stats scales state by whole tensors, not by slices; leave it out, {remedy}")


def refuse_writing_in_place(cfg: Any) -> None:
    """Raise ConfigurationError for fairseq's asynchronous writer, which leaves a truncated checkpoint if killed."""
    if cfg.checkpoint.write_checkpoints_asynchronously:
        raise ConfigurationError("--write-checkpoints-asynchronously leaves a truncated file if the run is killed; leave it out")
