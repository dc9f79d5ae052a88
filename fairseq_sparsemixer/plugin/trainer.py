"""fairseq's Trainer with expert parallelism; without experts, or on one rank, it behaves like fairseq's own.

fairseq looks up its Trainer by name in fairseq_cli.train, so `install` puts this subclass there. It keeps the gradients of
sharded experts on the scale of all others. The experts are shared out in expert_shards.py; checkpointing is in
checkpointing_trainer.py, and the checks of flags are in refusals.py.
"""

import logging
import sys
from functools import partial
from itertools import chain, cycle, repeat
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import fairseq_cli.train
from fairseq import utils
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import open_dict
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.criterions.auxiliary_losses import warn_of_plain_criterion
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe import gradients
from fairseq_sparsemixer.moe.early_reduction import EarlyReduction
from fairseq_sparsemixer.moe.gates import reset_step_states, update_step_states
from fairseq_sparsemixer.moe.gates.balance_scope import Update
from fairseq_sparsemixer.moe.gating_dropout import stays_on_rank
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.options import moe_option
from fairseq_sparsemixer.plugin.balance import counting_ahead, set_balance_scope, spans_ranks
from fairseq_sparsemixer.plugin.batches import explaining_no_batch
from fairseq_sparsemixer.plugin.checkpointing_trainer import CheckpointingTrainer
from fairseq_sparsemixer.plugin.expert_shards import can_reduce_early, share_out_experts, slices_replicas, warn_of_no_exchange
from fairseq_sparsemixer.plugin.freezing import freeze
from fairseq_sparsemixer.plugin.lost_ranks import explaining_lost_ranks, set_timeout, timeout_of
from fairseq_sparsemixer.plugin.micro_batches import Sums, of_own_batches
from fairseq_sparsemixer.plugin.refusals import refuse_missing_tpu, refuse_training_apart, refuse_writing_in_place
from fairseq_sparsemixer.plugin.traces.training import follow_training
from fairseq_sparsemixer.plugin.unequal_forwards import generating_together

logger = logging.getLogger(__name__)

SEEDS_A_RANK = 1_000_003  # more than the updates of a run; torch on a CPU uses only the lower 32 bits of a seed


class MoETrainer(CheckpointingTrainer):
    """fairseq's Trainer for models with experts."""

    batch_numbers: Iterator[int] = repeat(0)  # of the next batches in the update
    batches: Sequence[Any] = ()  # of the update
    update: Optional[Update] = None  # with --balance-scope update
    early: Optional[EarlyReduction] = None  # of expert gradients
    ranks_wait = False  # whether a layer's forward waits for other ranks

    def __init__(self, cfg: Any, task: Any, model: nn.Module, criterion: nn.Module, quantizer: Any = None):
        refuse_missing_tpu(cfg)
        self.moe_layers = moe_layers(model)
        self.expert_group = None
        if self.moe_layers:
            refuse_training_apart()
            timeout = timeout_of(cfg)
            with explaining_lost_ranks(cfg):
                set_timeout(timeout)
                self.expert_group = share_out_experts(cfg, task, model, timeout)
                self.update = set_balance_scope(cfg, task, model, timeout)
            self.by_slices = self.expert_group is not None and slices_replicas(cfg, self.expert_group.num_replicas)
            self.ranks_wait = spans_ranks(model) or self.exchanges_tokens
            keep_one_state_a_parameter(cfg)
            refuse_writing_in_place(cfg)
            warn_of_plain_criterion(criterion, cfg.criterion._name)
            if not self.exchanges_tokens:
                warn_of_no_exchange(cfg)
        freeze(cfg, model)
        self.follower = follow_training(cfg, model, criterion, self.get_num_updates)
        self.sharded = self.exchanges_tokens and moe_option(cfg.model, "sharded_checkpoints")
        self.has_experts = bool(self.moe_layers)
        with explaining_lost_ranks(cfg):
            super().__init__(cfg, task, model, criterion, quantizer)
        if self.expert_group is not None and can_reduce_early(cfg, task, self.expert_group):
            self.early = EarlyReduction(model, self.expert_group)

    @property
    def exchanges_tokens(self) -> bool:
        """Whether this rank holds only some of the experts."""
        return self.expert_group is not None and self.expert_group.size > 1

    @property
    def model(self) -> nn.Module:
        """See Trainer. Raises ConfigurationError where torch refuses the GPU's number that fairseq passes on a CPU, too."""
        try:
            return super().model
        except ValueError as error:
            if isinstance(error, ConfigurationError) or not (self.cfg.common.cpu and "device_ids" in str(error)):
                raise
            backend = self.cfg.distributed_training.ddp_backend
            sentence = f"--ddp-backend {backend} needs GPUs, but --cpu is given; use --ddp-backend legacy_ddp"
            raise ConfigurationError(sentence) from None

    def get_train_iterator(self, epoch: int, combine: bool = True, load_dataset: bool = True, *args: Any, **kwargs: Any):
        """See Trainer. Where fairseq reuses the batches of epoch 1 in later ones, a resumed run gets the same batches.

        fairseq-fixed makes a resumed run's batches by the epoch in which it resumes.
        """
        reused = self.task.dataset_to_epoch_iter
        with explaining_no_batch(self.cfg.dataset.train_subset, self.cfg.dataset, self.task):
            before = list(reused.values())
            iterator = super().get_train_iterator(epoch, combine, load_dataset, *args, **kwargs)
            dataset = self.task.dataset(self.cfg.dataset.train_subset)
            if epoch > 1 and reused.get(dataset) is iterator and iterator not in before:
                del reused[dataset]
                iterator = super().get_train_iterator(1, combine, False, *args, **kwargs)
            return iterator

    def get_valid_iterator(self, subset: str, *args: Any, **kwargs: Any):
        """See Trainer."""
        if self.follower is not None:
            self.follower.valid_subset = subset
        with explaining_no_batch(subset, self.cfg.dataset, self.task):
            return super().get_valid_iterator(subset, *args, **kwargs)

    def train_step(self, samples: List[Dict[str, Any]], raise_oom: bool = False):
        """See Trainer. A rank that runs out of memory ends the run, because the others wait for it in mid-batch."""
        self.in_train_step = True
        self.batches = samples
        self.batch_numbers = cycle(range(len(samples)))  # more than one pass, with --balance-scope update
        try:
            with explaining_lost_ranks(self.cfg), generating_together(self.ranks_wait), counting_ahead(self, samples):
                output = super().train_step(samples, raise_oom or self.ranks_wait)
        finally:
            self.in_train_step = False
        if self.expert_group is not None and self.expert_group.timer is not None:
            elapsed = self.expert_group.timer.read()
            metrics.log_scalar("all_to_all_cpu_time_ms", elapsed.cpu, round=2)
            metrics.log_scalar("all_to_all_cuda_time_ms", elapsed.cuda, round=2)
        return output

    def valid_step(self, sample: Dict[str, Any], raise_oom: bool = False):
        """See Trainer and train_step."""
        with explaining_lost_ranks(self.cfg), generating_together(self.ranks_wait):
            return super().valid_step(sample, raise_oom or self.ranks_wait)

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """See Trainer, which calls this once per update, after reducing and scaling all gradients but the experts'.

        Scaling and summing commute, so the experts' gradients are reduced here, before one norm of all gradients.
        """
        if self.expert_group is None:
            return super().clip_grad_norm(clip_norm)
        if self.early is None:
            gradients.reduce_expert_gradients(self.get_model(), self.expert_group)
        else:
            self.early.finish()
        if self.cfg.common.amp:
            gradients.share_overflow(self.get_model(), self.expert_group)
        trained = list(self.optimizer.params)
        ranks = None if self.by_slices else self.expert_group.group  # None: all; replicas have other slices, or the same experts
        with self.narrowed():
            if all(hasattr(parameter, "expert") for parameter in trained):  # by --freeze: fairseq would take their norm for zero
                with gradients.unmarked(trained):
                    norm = partial(gradients.norm_over, ranks=ranks)
                    return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=norm)
            join = partial(gradients.add_expert_norm, parameters=trained, ranks=ranks)
            return self.optimizer.clip_grad_norm(clip_norm, aggregate_norm_fn=join)

    def _prepare_sample(self, sample: Any, is_dummy: bool = False):
        if not is_dummy:  # fairseq calls this once per batch, and from within for the copy that an idle rank gets
            number = next(self.batch_numbers)
            self._decide_where_tokens_go(number)
            if self.early is not None:
                self.early.expect(last=self.in_train_step and number == len(self.batches) - 1)
        # fairseq gives ranks that have run out of batches a copy of an old one, and ignores the result
        sample, is_dummy_batch = super()._prepare_sample(sample, is_dummy)
        for layer in self.moe_layers:
            layer.idle = is_dummy_batch
        return sample, is_dummy_batch

    def _decide_where_tokens_go(self, number: int) -> None:
        """Toss the coin of gating dropout for the number-th batch of the update, if it trains."""
        probability = moe_option(self.cfg.model, "moe_gating_dropout")
        numbers = self.cfg.common.seed, self.get_num_updates(), number
        stay = self.in_train_step and stays_on_rank(probability, *numbers)
        for layer in self.moe_layers:
            layer.stay_on_rank = stay

    def _aggregate_logging_outputs(
        self, logging_outputs: List[Dict[str, Any]], sample_size: Any, *stats: Any, ignore: bool = False
    ):
        sums = Sums(logging_outputs, sample_size, ignore)
        logs, size, ignored = of_own_batches(self.batches, sums) if self.in_train_step else sums
        return super()._aggregate_logging_outputs(logs, size, *stats, ignore=ignored)

    def _all_gather_list_sync(self, logging_outputs: List[Dict[str, Any]], *stats: Any, ignore: bool = False):
        # for scores that need every prediction, such as --report-mcc; fairseq's version needs a buffer on a GPU
        if self.cuda:
            return super()._all_gather_list_sync(logging_outputs, *stats, ignore=ignore)
        gathered: List[Any] = [None] * self.data_parallel_world_size
        own = ([] if ignore else logging_outputs, *stats)
        dist.all_gather_object(gathered, own, group=self.data_parallel_process_group)
        logs, *sums = zip(*gathered)
        return list(chain.from_iterable(logs)), [sum(values) for values in sums]

    def _set_seed(self) -> None:
        # fairseq gives every rank the same seed: all would draw the same noise for different tokens
        super()._set_seed()
        if self.moe_layers and self.data_parallel_rank > 0:
            seed = self.cfg.common.seed + self.get_num_updates()
            utils.set_torch_seed(seed + SEEDS_A_RANK * self.data_parallel_rank)

    def set_num_updates(self, num_updates: int) -> None:
        """See Trainer, which calls this after each optimizer step that was not skipped; also updates the gates' states."""
        super().set_num_updates(num_updates)
        if self.in_train_step:
            update_step_states(self.get_model())

    def zero_grad(self) -> None:
        """See Trainer: called before each step and after a failed one. Resets the sums of the gates' states, too."""
        super().zero_grad()
        reset_step_states(self.get_model())

    def consolidate_optimizer(self) -> None:
        """See CheckpointingTrainer."""
        with explaining_lost_ranks(self.cfg):
            super().consolidate_optimizer()

    def save_checkpoint(self, filename: str, extra_state: Dict[str, Any]) -> Optional[str]:
        """See CheckpointingTrainer."""
        with explaining_lost_ranks(self.cfg):
            return super().save_checkpoint(filename, extra_state)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any):
        """See CheckpointingTrainer."""
        with explaining_lost_ranks(self.cfg):
            return super().load_checkpoint(filename, *args, **kwargs)


def keep_one_state_a_parameter(cfg: Any) -> None:
    """With --fp16, keep fairseq from flattening parameters, so that the optimizer state fits any number of ranks."""
    if cfg.common.fp16 and not cfg.common.fp16_no_flatten_grads:
        logger.info("experts: setting --fp16-no-flatten-grads, so that checkpoints can move between world sizes")
        with open_dict(cfg):
            cfg.common.fp16_no_flatten_grads = True


def install() -> None:
    """Make fairseq-train and fairseq-hydra-train build this Trainer, also when run as `python -m fairseq_cli.train`.

    Processes that fairseq spawns import the user-dir again before they build a trainer.
    """
    modules: Tuple[Any, ...] = (fairseq_cli.train, sys.modules.get("__main__"), sys.modules.get("__mp_main__"))
    for module in modules:
        if getattr(module, "Trainer", None) is Trainer:
            module.Trainer = MoETrainer
