"""State of a gate that changes once per optimizer step, by a sum over the micro-batches and ranks of the step.

The gate passes a tensor of its forward through `watch`; the backward of that tensor adds an amount to the sum. After the
step, `update_step_states` sums over ranks and calls `step`. The state is then the same on every rank, and on one process
that accumulates the same batches.
"""

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch import distributed as dist


class _AddInBackward(torch.autograd.Function):
    """The identity; its backward adds the amount to its state, unless another tensor was watched later."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, amount: "Amount") -> Tensor:
        ctx.amount, ctx.turn = amount, amount.watched
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None]:
        if ctx.turn == ctx.amount.watched:
            ctx.amount.state.add(ctx.amount.value * grad.any())
        return grad, None


class Amount:
    """What a forward adds to a state: when the tensor that it watched last has a gradient other than zero.

    This counts only batches that train: validation and the recomputation under activation checkpointing do not run this
    backward, and fairseq's dummy batch, whose loss is multiplied by zero, has only zero gradients.
    """

    def __init__(self, state: "StepState", value: Tensor):
        self.state, self.value, self.watched = state, value, 0

    def watch(self, tensor: Tensor) -> Tensor:
        """The tensor; its backward adds the amount, and no longer that of a tensor watched before."""
        self.watched += 1
        watched: Tensor = _AddInBackward.apply(tensor, self)
        return watched


class StepState(nn.Module):
    """Float buffers of one gate that `step` changes: at least float32 in any precision, and saved in the checkpoint.

    `shape` is that of the amounts.
    """

    frozen = False  # whether the state stays as it is
    over_layers = False  # whether the sum also runs over all layers of the model, which then change alike

    def __init__(self, *shape: int):
        super().__init__()
        self.shape = torch.Size(shape)
        self.pending: Optional[Tensor] = None  # the sum; not a buffer: it is local to the rank and must not be broadcast

    def watch(self, tensor: Tensor, amount: Tensor) -> Tensor:
        """The tensor; its backward adds the amount."""
        return Amount(self, amount).watch(tensor)

    def add(self, amount: Tensor) -> None:
        """The amount of one more micro-batch."""
        self.pending = amount if self.pending is None else self.pending + amount

    def amount(self) -> Tensor:
        """The sum so far, of the dtype of the buffers; zeros if nothing was added."""
        buffer = next(self.buffers())
        return buffer.new_zeros(self.shape) if self.pending is None else self.pending.to(buffer.dtype)

    def forget(self) -> None:
        """Discard the sum of a step that did not happen, along with its gradients."""
        self.pending = None

    def step(self, total: Tensor) -> None:
        """Change the buffers by the sum of all ranks; zeros must change nothing."""
        raise NotImplementedError

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        before = dict(self.named_buffers())
        super()._apply(fn, *args, **kwargs)
        for name, buffer in self.named_buffers():  # .half() would round away small steps
            self._buffers[name] = before[name].to(buffer.device, torch.promote_types(buffer.dtype, torch.float32))
        return self


def _states(model: nn.Module) -> List[StepState]:
    return [module for module in model.modules() if isinstance(module, StepState)]


def update_step_states(model: nn.Module) -> None:
    """Step every StepState of the model by the sums of all ranks; call once per optimizer step, on every rank.

    A collective of the default process group, if there is one; a no-op for a model without such states.
    """
    states = _states(model)
    if not states:
        return
    flat = torch.cat([state.amount().reshape(-1) for state in states])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat)
    totals = [part.view(s.shape) for s, part in zip(states, flat.split([s.shape.numel() for s in states]))]
    for state, total in zip(states, totals):
        if state.over_layers:
            total = torch.stack([other for kin, other in zip(states, totals) if type(kin) is type(state)]).sum(0)
        if not state.frozen:
            state.step(total)
        state.forget()


def reset_step_states(model: nn.Module) -> None:
    """Discard the sums of a failed step, along with its gradients."""
    for state in _states(model):
        state.forget()
