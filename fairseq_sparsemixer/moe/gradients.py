"""Gradients of sharded experts, on the same scale as all other gradients.

An expert's gradient is already a sum over the tokens of its group's ranks, while data parallelism averages the others over
all W ranks (and fairseq later multiplies everything by W / sample size). So, once per update: sum over the replicas and
divide by W. All functions here are collectives.
"""

from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List, Sequence

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import ExpertGroup


def reduce_expert_gradients(model: nn.Module, expert_group: ExpertGroup) -> None:
    """Sum over replicas, divided by W. A missing gradient counts as zero, because every rank must join every sum."""
    wait_for([start_reduction(parameter, expert_group) for parameter in trained_experts(model)])


def trained_experts(model: nn.Module) -> List[nn.Parameter]:
    """The parameters of this rank's experts that are not frozen."""
    return [parameter for parameter in _experts(model.parameters()) if parameter.requires_grad]


def start_reduction(parameter: nn.Parameter, expert_group: ExpertGroup) -> Any:
    """Start reduce_expert_gradients for one parameter -> the work to wait for; None without replicas."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.div_(expert_group.world_size)
    if expert_group.num_replicas == 1:
        return None
    return dist.all_reduce(parameter.grad, group=expert_group.replicas, async_op=True)


def wait_for(started: Iterable[Any]) -> None:
    """Wait for the sums that start_reduction has started."""
    for work in started:
        if work is not None:
            work.wait()


def add_expert_norm(norm: Tensor, parameters: Iterable[nn.Parameter], ranks: Any) -> Tensor:
    """The 2-norm of all gradients, equal on all ranks, given the norm of the replicated parameters' gradients.

    `parameters` are this rank's, including its experts; `ranks` the process group that has each expert's gradient once.
    """
    grads = [parameter.grad for parameter in _experts(parameters) if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    own = torch.linalg.vector_norm(torch.stack(norms)) if norms else norm.new_zeros(())
    return torch.hypot(norm, norm_over(own, ranks).to(norm.device))


def norm_over(norm: Tensor, ranks: Any) -> Tensor:
    """The 2-norm of the gradients of all experts, given that of this rank's; ranks: see add_expert_norm."""
    square = norm.square()
    dist.all_reduce(square, group=ranks)
    return torch.sqrt(square)


@contextmanager
def unmarked(experts: Sequence[nn.Parameter]) -> Iterator[None]:
    """In this context, experts look like other parameters to fairseq."""
    for parameter in experts:
        del parameter.expert  # type: ignore[attr-defined]  # fairscale's mark
    try:
        yield
    finally:
        for parameter in experts:
            parameter.expert = True  # type: ignore[attr-defined]  # as above


def share_overflow(model: nn.Module, expert_group: ExpertGroup) -> None:
    """Make an infinite or NaN expert gradient of one rank visible to all: torch's GradScaler checks only its own rank."""
    finite = [parameter.grad.isfinite().all() for parameter in _experts(model.parameters()) if parameter.grad is not None]
    if not finite:  # the same on every rank: all experts are frozen
        return
    overflow = (~torch.stack(finite).all()).float()
    dist.all_reduce(overflow, group=expert_group.group)
    witness = next(p.grad for p in model.parameters() if p.grad is not None)
    witness.add_(torch.where(overflow > 0, torch.inf, 0.0).to(witness.dtype))


def _experts(parameters: Iterable[nn.Parameter]) -> List[nn.Parameter]:
    return [parameter for parameter in parameters if hasattr(parameter, "expert")]
