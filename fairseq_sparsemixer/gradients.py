"""Gradients of experts that are spread over ranks, on the scale of all other gradients.

An expert's gradient is already a sum over the tokens of its group's ranks, while fairseq averages the others over all
W ranks and later multiplies everything by W / sample size. So: add up the replicas, divide by W, once an update.
"""

from typing import Any, Callable, List, Optional

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.parallel import ExpertGroup


def synchronise_experts(optimizer: Any, model: nn.Module, ranks: ExpertGroup, amp: bool) -> None:
    """Extend a FairseqOptimizer's all_reduce_grads and clip_grad_norm by the experts of `model`."""
    experts = [parameter for parameter in model.parameters() if hasattr(parameter, "expert")]
    others = [parameter for parameter in model.parameters() if not hasattr(parameter, "expert")]
    all_reduce_grads, clip_grad_norm = optimizer.all_reduce_grads, optimizer.clip_grad_norm

    def reduce_experts_too(module: nn.Module) -> None:
        all_reduce_grads(module)
        reduce_expert_gradients(experts, ranks)
        if amp:
            share_overflow(experts, others, ranks)

    def clip_by_one_norm(max_norm: float, aggregate_norm_fn: Optional[Callable] = None) -> Tensor:
        def with_experts(norm: Tensor) -> Tensor:
            norm = norm if aggregate_norm_fn is None else aggregate_norm_fn(norm)
            return torch.sqrt(norm.square() + expert_square_norm(optimizer, ranks).to(norm.device))

        return clip_grad_norm(max_norm, with_experts)

    optimizer.all_reduce_grads = reduce_experts_too
    optimizer.clip_grad_norm = clip_by_one_norm


def reduce_expert_gradients(experts: List[nn.Parameter], ranks: ExpertGroup) -> None:
    """Sum over replicas, divided by W. A missing gradient counts as zero: every rank takes part in every sum."""
    for parameter in experts:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.div_(ranks.world_size)
        if ranks.num_replicas > 1:
            dist.all_reduce(parameter.grad, group=ranks.replicas)


def share_overflow(experts: List[nn.Parameter], others: List[nn.Parameter], ranks: ExpertGroup) -> None:
    """Make an infinite or undefined expert gradient of one rank visible to all: torch's GradScaler looks only at its own."""
    finite = torch.stack([parameter.grad.isfinite().all() for parameter in experts]).all()
    overflow = (~finite).float()
    dist.all_reduce(overflow, group=ranks.group)
    witness = next(parameter.grad for parameter in others if parameter.grad is not None)
    witness.add_(torch.where(overflow > 0, torch.inf, 0.0).to(witness.dtype))


def expert_square_norm(optimizer: Any, ranks: ExpertGroup) -> Tensor:
    """The squared 2-norm of the gradients of all E experts, equal on all ranks: a sum over the ranks of a group."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if hasattr(p, "expert") and p.grad is not None]
    squares = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32).square() for grad in grads]).sum()
    dist.all_reduce(squares, group=ranks.group)
    return squares
