"""--balance-scope: sets the gates' scope, and counts the routing of a whole update before it is trained on."""

from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Dict, Iterator, List, Optional
from unittest.mock import patch

import torch
from fairseq.logging import metrics
from torch import nn
from torch import distributed as dist

from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLosses
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope, SequenceScope, Update, UpdateScope
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.moe.parallel import RankGroup
from fairseq_sparsemixer.options import moe_option
from fairseq_sparsemixer.plugin.refusals import OWN_TOKENS
from fairseq_sparsemixer.plugin.unequal_forwards import refuse_unequal_forwards, refusing_generation

TWICE = "which --balance-scope update would do twice for each batch, with other words; use --balance-scope global or local"
SCOPES = ("sequence", "local", "global", "update")


def set_balance_scope(cfg: Any, task: Any, model: nn.Module, timeout: Optional[timedelta]) -> Optional[Update]:
    """Give every gate the scope of --balance-scope; returns what counts a whole update, for `update`.

    Raises ConfigurationError for an unknown scope.
    """
    scope = moe_option(cfg.model, "balance_scope")
    if scope not in SCOPES:
        raise ConfigurationError(f"--balance-scope {scope} is unknown; choose {', '.join(SCOPES[:-1])} or {SCOPES[-1]}")
    gates = [layer.gate for layer in moe_layers(model)]
    everyone = None
    if scope in ("global", "update") and dist.is_initialized() and dist.get_world_size() > 1:
        refuse_unequal_forwards(cfg, task, OWN_TOKENS)
        everyone = RankGroup(dist.new_group(timeout=timeout))  # a separate group: DistributedDataParallel uses the default one
    update = Update(everyone) if scope == "update" else None
    for gate in gates:
        if scope == "sequence":
            gate.balance_scope = SequenceScope()
        elif update is not None:
            gate.balance_scope = update.scope()
        elif everyone is not None:
            gate.balance_scope = RanksScope(everyone)
    return update


def spans_ranks(model: nn.Module) -> bool:
    """Whether the balance loss of a forward waits for the other ranks."""
    scopes = [layer.gate.balance_scope for layer in moe_layers(model)]
    return any(isinstance(s, RanksScope) or (isinstance(s, UpdateScope) and s.update.group is not None) for s in scopes)


@contextmanager
def counting_ahead(trainer: Any, samples: List[Dict[str, Any]]) -> Iterator[None]:
    """Around a fairseq Trainer's train_step on `samples`: with --balance-scope update, count their routing first.

    Counting runs the task's own train_step without gradients, from the same seed: dropout and samples of experts are those
    of the training that follows. It is not needed for a single micro-batch, whose sums are exchanged in its forward, nor for
    a criterion without balance losses.
    """
    if trainer.update is None or len(samples) < 2 or not isinstance(trainer.get_criterion(), AuxiliaryLosses):
        yield
        return
    trainer.update.start_counting()
    try:
        trainer._set_seed()
        trainer.criterion.train()
        without_backward = patch.object(trainer.optimizer, "backward", lambda loss: None)
        with torch.no_grad(), metrics.aggregate(new_root=True), without_backward, refusing_generation(TWICE):
            for sample in samples:
                sample, is_dummy = trainer._prepare_sample(sample)
                trainer.task.train_step(
                    sample, trainer.model, trainer.criterion, trainer.optimizer, trainer.get_num_updates(), is_dummy
                )
        trainer.update.finish_counting()
        yield
    finally:
        trainer.update.end()
