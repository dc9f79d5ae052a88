"""What expert parallelism adds to fairseq's Trainer; without experts, or on one rank, it is fairseq's own.

fairseq builds its Trainer by name in fairseq_cli.train, so that is where `install` puts this subclass. It spreads the
experts over ranks before the model reaches a device, keeps their gradients on the scale of all others, and writes
checkpoints that know nothing of ranks.
"""

import logging
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, Dict, Iterator, List, Optional

import fairseq_cli.train
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer import gathering, gradients
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe_layer import moe_layers, spread_experts
from fairseq_sparsemixer.parallel import Clock, ExpertGroup, expert_parallel_size, form_expert_group

logger = logging.getLogger(__name__)

LOST_CONTACT = (  # in gloo's and NCCL's words
    "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "remote process exited",
)  # fmt: skip


class MoETrainer(Trainer):
    """fairseq's Trainer for models with experts. `ranks` is None where every rank holds all of them."""

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module, quantizer: Any = None):
        self.moe_layers = moe_layers(model)
        self.ranks = None
        if self.moe_layers:
            timeout = set_timeout(cfg)
            self.ranks = share_out_experts(cfg, model, timeout)
            set_balance_scope(cfg, model, timeout)
            keep_one_state_a_parameter(cfg)
        self.sharded = self.ranks is not None and getattr(cfg.model, "sharded_checkpoints", False)
        self._gathered: Optional[gathering.Gathered] = None
        self._in_train_step = False
        if self.sharded:
            prepare_sharded_checkpoints(cfg)
        super().__init__(cfg, task, model, criterion, quantizer)

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        if self.ranks is not None:
            gathering.load_own_share(self._optimizer.optimizer, self.ranks)

    def train_step(self, samples: List[Dict[str, Any]], raise_oom: bool = False):
        """See Trainer. A rank that runs out of memory ends the run: the others wait for it in the middle of the batch."""
        self._in_train_step = True
        try:
            with self._explaining_lost_ranks():
                output = super().train_step(samples, raise_oom or self.ranks is not None)
        finally:
            self._in_train_step = False
        if self.ranks is not None and self.ranks.clock is not None:
            elapsed = self.ranks.clock.read()
            metrics.log_scalar("all_to_all_cpu_time_ms", elapsed.cpu, round=2)
            metrics.log_scalar("all_to_all_cuda_time_ms", elapsed.cuda, round=2)
        return output

    def valid_step(self, sample: Dict[str, Any], raise_oom: bool = False):
        """See Trainer and train_step."""
        with self._explaining_lost_ranks():
            return super().valid_step(sample, raise_oom or self.ranks is not None)

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """See Trainer, which calls this once an update, when all gradients but the experts' are reduced and scaled.

        Scaling and summing commute, so this is the time for the experts' sums, and for one norm of all gradients.
        """
        if self.ranks is None:
            return super().clip_grad_norm(clip_norm)
        gradients.reduce_expert_gradients(self.get_model(), self.ranks)
        if self.cfg.common.amp:
            gradients.share_overflow(self.get_model(), self.ranks)
        join = partial(gradients.add_expert_norm, parameters=list(self.optimizer.params), ranks=self.ranks)
        return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=join)

    def _prepare_sample(self, sample: Any, is_dummy: bool = False):
        # fairseq fills up ranks that have run out of batches with a copy of an old one, and ignores what comes of it
        sample, is_dummy_batch = super()._prepare_sample(sample, is_dummy)
        for layer in self.moe_layers:
            layer.idle = is_dummy_batch
        return sample, is_dummy_batch

    @contextmanager
    def _explaining_lost_ranks(self) -> Iterator[None]:
        """End with one sentence when another rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.data_parallel_world_size > 1 and any(words in str(error).lower() for words in LOST_CONTACT):
                raise ConfigurationError(
                    f"rank {self.data_parallel_rank} lost contact with another rank ({str(error).splitlines()[0]});"
                    f" start again to go on from {self.cfg.checkpoint.save_dir}/checkpoint_last.pt"
                ) from None
            raise

    def consolidate_optimizer(self) -> None:
        """Called by fairseq on every rank before one of them saves: the time to gather the experts."""
        super().consolidate_optimizer()
        # in a failing train step the other ranks are elsewhere: a collective would wait for them in vain
        if self.ranks is not None and not self.sharded and not self._in_train_step:
            with_optimizer = not self.cfg.checkpoint.no_save_optimizer_state
            with self._explaining_lost_ranks():
                self._gathered = gathering.gather_experts(
                    models=[self.get_model()] + ([self.ema.get_model()] if self.cfg.ema.store_ema else []),
                    optimizer=self.optimizer.optimizer if with_optimizer else None,
                    ranks=self.ranks,
                )

    def state_dict(self) -> Dict[str, Any]:
        """See Trainer; with the experts of all ranks where they were gathered."""
        state = super().state_dict()
        if self._gathered is not None:
            gathering.fill_in(state, self._gathered)
            self._gathered = None
        if self.sharded:
            state["expert_parallel"] = {"size": self.ranks.size, "index": self.ranks.index}
        return state

    def save_checkpoint(self, filename: str, extra_state: Dict[str, Any]) -> Optional[str]:
        """See Trainer. No crash.pt when experts are spread: one rank has only its own."""
        if self.ranks is not None and not self.sharded and self._gathered is None:
            if self.should_save_checkpoint_on_current_rank:
                logger.warning("%s is not written: experts are spread over ranks, and this one holds only its own", filename)
            return None
        return super().save_checkpoint(filename, extra_state)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any):
        """See Trainer. In a run with --sharded-checkpoints, a file of the whole model is found as well."""
        if self.sharded and not os.path.exists(filename):
            filename = filename.replace(self.checkpoint_suffix + ".pt", ".pt")
        if not os.path.exists(filename) and self.cfg.checkpoint.restore_file != "checkpoint_last.pt":
            raise ConfigurationError(f"--restore-file {self.cfg.checkpoint.restore_file} does not exist ({filename})")
        return super().load_checkpoint(filename, *args, **kwargs)

    @property
    def checkpoint_suffix(self) -> str:
        """See Trainer; `-rank-N` with --sharded-checkpoints, N the rank's place in its group."""
        return super().checkpoint_suffix + (f"-rank-{self.ranks.index}" if self.sharded else "")

    @property
    def should_save_checkpoint_on_current_rank(self) -> bool:
        """See Trainer; with --sharded-checkpoints, every rank of the first group."""
        return self.ranks.first_group if self.sharded else super().should_save_checkpoint_on_current_rank


def share_out_experts(cfg: Any, model: nn.Module, timeout: Optional[timedelta]) -> Optional[ExpertGroup]:
    """Leave this rank its share of the experts of every layer; None when every rank keeps them all.

    Raises ConfigurationError for sizes that do not divide, and for parts of fairseq that cannot go with it.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    layers = moe_layers(model)
    try:
        size = expert_parallel_size(cfg.model.expert_parallel_size, world_size, layers[0].gate.num_experts)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if size == 1:
        return None
    refuse_incompatible(cfg, size)
    ranks = form_expert_group(size, timeout, Clock() if getattr(cfg.model, "record_a2a_perf_stats", False) else None)
    spread_experts(model, ranks)
    logger.info("experts spread over %d ranks, %d on each, %d replicas", size, layers[0].num_local_experts, ranks.num_replicas)
    return ranks


def set_timeout(cfg: Any) -> Optional[timedelta]:
    """Apply --collective-timeout to fairseq's process group, which is there already; None when it is not given.

    Raises ConfigurationError when it is not positive.
    """
    seconds = getattr(cfg.model, "collective_timeout", None)
    if seconds is None:
        return None
    if seconds <= 0:
        raise ConfigurationError(f"--collective-timeout {seconds} must be positive; leave it out for torch's default")
    timeout = timedelta(seconds=seconds)
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(timeout)  # torch has no public way once the group is made
    return timeout


def set_balance_scope(cfg: Any, model: nn.Module, timeout: Optional[timedelta]) -> None:
    """With --balance-scope global, let the balance losses speak of the tokens of all ranks.

    Raises ConfigurationError for an unknown scope.
    """
    scope = getattr(cfg.model, "balance_scope", "local")
    if scope not in ("local", "global"):
        raise ConfigurationError(f"--balance-scope {scope} is unknown; choose local or global")
    if scope == "global" and dist.is_initialized() and dist.get_world_size() > 1:
        everyone = dist.new_group(timeout=timeout)  # its own: DistributedDataParallel keeps the default group busy
        for layer in moe_layers(model):
            layer.gate.balance_group = everyone


def refuse_incompatible(cfg: Any, size: int) -> None:
    """Raise ConfigurationError for options of fairseq that assume the same parameters on every rank."""
    remedy = "use --expert-parallel-size 1, which keeps all experts on every rank"
    distributed = cfg.distributed_training
    if distributed.ddp_backend not in ("legacy_ddp", "no_c10d", "pytorch_ddp", "c10d"):
        raise ConfigurationError(
            f"--ddp-backend {distributed.ddp_backend} averages or shards all parameters over ranks, and experts spread over"
            f" {size} ranks differ; use legacy_ddp or pytorch_ddp, or {remedy}"
        )
    if distributed.zero_sharding != "none":
        raise ConfigurationError(
            f"--zero-sharding {distributed.zero_sharding} hands every parameter's update to one rank, and experts spread over"
            f" {size} ranks differ; {remedy}"
        )
    for flag in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(cfg.model, flag, 0):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} {getattr(cfg.model, flag)} may skip a layer on one rank while another waits in"
                f" it; set it to 0, or {remedy}"
            )
    if cfg.optimization.use_bmuf:
        raise ConfigurationError(f"--use-bmuf averages models over ranks, and experts differ by rank; {remedy}")


def keep_one_state_a_parameter(cfg: Any) -> None:
    """Under --fp16, keep fairseq from flattening parameters: the same optimizer state then fits any number of ranks."""
    if cfg.common.fp16 and not cfg.common.fp16_no_flatten_grads:
        logger.info("experts: --fp16-no-flatten-grads is set, so that checkpoints move between world sizes")
        with open_dict(cfg):
            cfg.common.fp16_no_flatten_grads = True


def prepare_sharded_checkpoints(cfg: Any) -> None:
    """Let every rank read its own file."""
    os.makedirs(cfg.checkpoint.save_dir, exist_ok=True)
    with open_dict(cfg):
        cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True


def install() -> None:
    """Make fairseq-train and fairseq-hydra-train build this Trainer, also when run as `python -m fairseq_cli.train`.

    In processes that fairseq spawns, it imports the user-dir again before it builds a trainer.
    """
    for module in (fairseq_cli.train, sys.modules.get("__main__"), sys.modules.get("__mp_main__")):
        if getattr(module, "Trainer", None) is Trainer:
            module.Trainer = MoETrainer
