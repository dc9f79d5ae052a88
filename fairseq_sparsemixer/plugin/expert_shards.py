"""Shares out the experts of a model over the ranks, by the flags of a command, before the model is moved to a device."""

import logging
import math
from datetime import timedelta
from typing import Any, Optional

from fairseq.tasks import FairseqTask
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer.moe.layer import moe_layers, shard_experts
from fairseq_sparsemixer.moe.parallel import CollectiveTimer, ExpertGroup, expert_parallel_size, form_expert_group
from fairseq_sparsemixer.names import PYTORCH_DDP
from fairseq_sparsemixer.options import FLAGS, MoEOptions, in_flags, moe_option
from fairseq_sparsemixer.plugin.models.layer_choice import of_some_layers
from fairseq_sparsemixer.plugin.refusals import KEEP_ALL, refuse_incompatible, refuse_unsliceable
from fairseq_sparsemixer.plugin.unequal_forwards import refuse_unequal_forwards

logger = logging.getLogger(__name__)


def share_out_experts(cfg: Any, task: Any, model: nn.Module, timeout: Optional[timedelta]) -> Optional[ExpertGroup]:
    """Shard the experts of every layer over ranks; None if every rank keeps all experts, and updates all of them.

    Raises ConfigurationError for sizes that do not divide, and for incompatible fairseq options.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    layers = moe_layers(model)
    numbers = {layer.gate.num_experts for layer in layers}
    with of_some_layers(cfg.model, numbers), in_flags():
        common = math.gcd(*numbers)
        size = expert_parallel_size(cfg.model.expert_parallel_size, world_size, common)
    by_slices = slices_replicas(cfg, world_size // size)
    if by_slices:
        refuse_unsliceable(cfg)
    elif moe_option(cfg.model, "shard_expert_optimizer"):
        logger.warning("--shard-expert-optimizer changes nothing: each expert is on one rank only")
    if size == 1 and not by_slices:
        return None
    if size > 1:
        refuse_incompatible(cfg, size)
        refuse_unequal_forwards(cfg, task, KEEP_ALL)
    ranks_per_node = moe_option(cfg.model, "moe_hierarchical_exchange")
    timer = CollectiveTimer() if moe_option(cfg.model, "record_a2a_perf_stats") else None
    with in_flags():
        expert_group = form_expert_group(size, timeout, timer, moe_option(cfg.model, "moe_overlap"), ranks_per_node)
    shard_experts(model, expert_group)
    if size == 1:
        return expert_group
    if ranks_per_node is not None and expert_group.nodes is None:
        message = "--moe-hierarchical-exchange %d changes nothing: it needs several nodes with several ranks of each group of %d"
        logger.warning(message, ranks_per_node, size)
    local = ", ".join(sorted({str(layer.num_local_experts) for layer in layers}, key=int))
    logger.info("experts sharded over %d ranks, %s on each, %d replicas", size, local, expert_group.num_replicas)
    return expert_group


def slices_replicas(cfg: Any, num_replicas: int) -> bool:
    """Whether each of the replicas of an expert updates a slice of it."""
    return moe_option(cfg.model, "shard_expert_optimizer") and num_replicas > 1


def can_reduce_early(cfg: Any, task: Any, expert_group: ExpertGroup) -> bool:
    """Whether expert gradients can be summed over replicas during the backward pass.

    Only if data parallelism's are, too, as legacy_ddp keeps collectives from running at once, and only if a gradient is
    complete when it is there: tasks with a train_step of their own may run backward several times, and activation
    checkpointing does.
    """
    return (
        expert_group.num_replicas > 1
        and cfg.distributed_training.ddp_backend in PYTORCH_DDP
        and type(task).train_step is FairseqTask.train_step
        and not getattr(cfg.model, "checkpoint_activations", False)
    )


def warn_of_no_exchange(cfg: Any) -> None:
    """Warn of flags about the exchange of tokens, which does not happen if every rank holds all experts."""
    for name in ("moe_gating_dropout", "moe_overlap", "moe_hierarchical_exchange"):
        value = moe_option(cfg.model, name)
        if value != getattr(MoEOptions, name):
            logger.warning("%s %g changes nothing: every rank holds all experts", FLAGS[name], value)
