"""Expert gradients summed over replicas while the backward pass still runs, in the last micro-batch of an update."""

from functools import partial
from typing import Any, List, Set

import torch
from torch import nn

from fairseq_sparsemixer.moe.gradients import start_reduction, trained_experts, wait_for
from fairseq_sparsemixer.moe.parallel import ExpertGroup


class EarlyReduction:
    """As reduce_expert_gradients, but each sum starts once its gradient is there, and the backward pass ends by waiting for all.

    Replicas must start their sums in the same order. As in DistributedDataParallel, that is the order of the last parameter
    to the first: a gradient that is early waits for those before it. For a single backward pass per micro-batch in which
    each gradient is complete once autograd has accumulated it; so not for reentrant activation checkpointing.
    """

    def __init__(self, model: nn.Module, expert_group: ExpertGroup):
        self.expert_group = expert_group
        self.parameters = trained_experts(model)[::-1]
        self.expect(last=False)
        for place, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._accumulated, place))

    def expect(self, last: bool) -> None:
        """Call before each micro-batch. last: whether it is the update's last one."""
        self._last = last
        self._ready: Set[int] = set()
        self._started: List[Any] = []  # the work of the first parameters' sums; None without replicas
        self._finished = False

    def finish(self) -> None:
        """Reduce what has not been reduced since `expect`, and wait for all. A missing gradient counts as zero."""
        if self._finished:
            return
        while len(self._started) < len(self.parameters):
            self._start_next()
        wait_for(self._started)
        self._finished = True

    def _accumulated(self, place: int, parameter: nn.Parameter) -> None:
        if not self._last:
            return
        if place < len(self._started):
            raise RuntimeError("an expert's gradient changed after its reduction, as backward ran twice on a micro-batch")
        if not self._ready:
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)  # as DDP does
        self._ready.add(place)
        while len(self._started) in self._ready:
            self._start_next()

    def _start_next(self) -> None:
        self._started.append(start_reduction(self.parameters[len(self._started)], self.expert_group))
