"""What expert parallelism adds to fairseq's Trainer; without experts, or on one rank, it is fairseq's own.

fairseq builds its Trainer by name in fairseq_cli.train, so that is where `install` puts this subclass. It spreads the
experts over ranks before the model reaches a device, keeps their gradients on the scale of all others, and writes
checkpoints that know nothing of ranks.
"""

import logging
import os
from typing import Any, Dict, List, Optional

from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer import gathering, gradients
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe_layer import MoELayer
from fairseq_sparsemixer.parallel import ExpertGroup, expert_parallel_size, form_expert_group

logger = logging.getLogger(__name__)

LOST_CONTACT = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe")  # in gloo's and NCCL's words


class MoETrainer(Trainer):
    """fairseq's Trainer for models with experts. `ranks` is None where every rank holds all of them."""

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module, quantizer: Any = None):
        layers = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
        self.ranks = spread_experts(cfg, model, layers) if layers else None
        self.sharded = self.ranks is not None and getattr(cfg.model, "sharded_checkpoints", False)
        self._gathered: Optional[gathering.Gathered] = None
        self._in_train_step = False
        if layers:
            keep_one_state_a_parameter(cfg)
        if self.sharded:
            prepare_sharded_checkpoints(cfg)
        super().__init__(cfg, task, model, criterion, quantizer)

    def _build_optimizer(self) -> None:
        super()._build_optimizer()
        if self.ranks is not None:
            gradients.synchronise_experts(self._optimizer, self.get_model(), self.ranks, self.cfg.common.amp)
            gathering.load_own_share(self._optimizer.optimizer, self.ranks)

    def train_step(self, samples: List[Dict[str, Any]], raise_oom: bool = False):
        """See Trainer. Ends with one sentence when another rank is gone."""
        self._in_train_step = True
        try:
            return super().train_step(samples, raise_oom)
        except RuntimeError as error:
            if self.data_parallel_world_size > 1 and any(words in str(error).lower() for words in LOST_CONTACT):
                raise ConfigurationError(
                    f"rank {self.data_parallel_rank} lost contact with another rank ({str(error).splitlines()[0]});"
                    f" start again to go on from {self.cfg.checkpoint.save_dir}/checkpoint_last.pt"
                ) from None
            raise
        finally:
            self._in_train_step = False

    def consolidate_optimizer(self) -> None:
        """Called by fairseq on every rank before one of them saves: the time to gather the experts."""
        super().consolidate_optimizer()
        # in a failing train step the other ranks are elsewhere: a collective would wait for them in vain
        if self.ranks is not None and not self.sharded and not self._in_train_step:
            with_optimizer = not self.cfg.checkpoint.no_save_optimizer_state
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


def spread_experts(cfg: Any, model: nn.Module, layers: List[MoELayer]) -> Optional[ExpertGroup]:
    """Leave this rank its share of the experts of every layer; None when every rank keeps them all.

    Raises ConfigurationError for sizes that do not divide, and for parts of fairseq that cannot go with it.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    try:
        size = expert_parallel_size(cfg.model.expert_parallel_size, world_size, layers[0].gate.num_experts)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if size == 1:
        return None
    refuse_incompatible(cfg, size)
    ranks = form_expert_group(size)
    for layer in layers:
        layer.spread(ranks)
    # torch's DistributedDataParallel reads this list: experts differ by rank
    model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in model.named_parameters() if hasattr(parameter, "expert")
    ]
    logger.info("experts spread over %d ranks, %d on each, %d replicas", size, layers[0].num_local_experts, ranks.num_replicas)
    return ranks


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
    """Make fairseq-train and fairseq-hydra-train build this Trainer."""
    import fairseq_cli.train

    fairseq_cli.train.Trainer = MoETrainer
