"""The half of the trainer that shards the optimizer state of experts over their replicas: --shard-expert-optimizer.

fairseq's optimizers are used as they are. They are built, clip gradients and step while the experts' parameters are narrowed to
this rank's slices, so that moments, and the float32 copies of --fp16 and --bf16, are of slices only. Between these moments
the optimizer sees whole parameters, by the same indices as without the flag.
"""

import logging
from contextlib import nullcontext
from functools import wraps
from typing import Any, ContextManager, Optional

from fairseq.trainer import Trainer

from fairseq_sparsemixer.moe.gradients import trained_experts
from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices

logger = logging.getLogger(__name__)


class SlicingTrainer(Trainer):
    """fairseq's Trainer, which updates slices of the experts if `by_slices` is set before its optimizer is built."""

    expert_group: Optional[ExpertGroup] = None  # None: this rank holds all experts, and updates all of them
    by_slices = False
    slices: Optional[ReplicaSlices] = None  # of the trained experts

    def _build_optimizer(self) -> None:
        if not self.by_slices:
            super()._build_optimizer()
            return
        assert self.expert_group is not None
        self.model, self.criterion  # built here, as data parallelism is for whole parameters
        self.slices = ReplicaSlices(trained_experts(self.get_model()), self.expert_group)
        with self.slices.narrowed():
            super()._build_optimizer()
        step_by_slices(self._optimizer, self.slices)
        whole, own = (sum(tensor.numel() for tensor in each) for each in (self.slices.parameters, self.slices.owned()))
        logger.info("experts: this rank keeps optimizer state for %s of its %s numbers", f"{own:,}", f"{whole:,}")

    def narrowed(self) -> ContextManager[None]:
        """The context in which the experts' parameters and gradients are what this rank's optimizer updates."""
        return nullcontext() if self.slices is None else self.slices.narrowed()


def step_by_slices(optimizer: Any, slices: ReplicaSlices) -> None:
    """Let a fairseq optimizer update these slices, and then exchange them."""
    step = optimizer.step  # replaced on the object, as checkpoints record the name of its class

    @wraps(step)
    def step_and_exchange(*args: Any, **kwargs: Any) -> Any:
        with slices.updating():
            return step(*args, **kwargs)

    optimizer.step = step_and_exchange
