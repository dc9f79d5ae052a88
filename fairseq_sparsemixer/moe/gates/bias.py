"""Auxiliary-loss-free load balancing (Wang et al., 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

Each expert has a bias b_e that is added to its logit for selection only: combine weights and their gradients do not
depend on it. After every optimizer step

    b_e <- b_e + rate * sign(mean load - load_e),

where load_e is the number of tokens that chose e in that step, over all micro-batches and ranks. The papers add the bias
to sigmoid scores; here it is added to the logits, so that arg-max, top-k and sampled selection can all use it.
"""

import math
from typing import Any, Optional, Tuple

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.moe.gates.routing import Routing


class _CountInBackward(torch.autograd.Function):
    """The identity; its backward reports the load to the balancer.

    This counts only batches that train: validation and the recomputation under activation checkpointing do not run this
    backward, and fairseq's dummy batch, whose loss is multiplied by zero, has only zero gradients.
    """

    @staticmethod
    def forward(ctx: Any, combine_weight: Tensor, load: Tensor, balancer: "SelectionBias") -> Tensor:
        ctx.load, ctx.balancer = load, balancer
        return combine_weight.view_as(combine_weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        ctx.balancer.add(ctx.load * grad.any())
        return grad, None, None


class SelectionBias(nn.Module):
    """The bias [E] of one gate, always float32 and saved in the checkpoint, and the load since the last step.

    Raises ValueError if the rate is negative or not finite.
    """

    bias: Tensor

    def __init__(self, num_experts: int, rate: float):
        super().__init__()
        if not 0 <= rate < math.inf:
            raise ValueError(f"bias_update_rate={rate} must be at least 0 and finite; DeepSeek-V3 uses 0.001, and 0 disables it")
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))
        self.load: Optional[Tensor] = None  # [E]; not a buffer: it is local to the rank and must not be broadcast

    def watch(self, routing: Routing) -> Tensor:
        """The routing's combine_weight; its backward counts the tokens that chose each expert, dropped or not."""
        watched: Tensor = _CountInBackward.apply(routing.combine_weight, routing.chosen_count().sum(0), self)
        return watched

    def add(self, load: Tensor) -> None:
        """load [E] of one more micro-batch."""
        self.load = load if self.load is None else self.load + load

    def forget(self) -> None:
        """Discard the load of a step that did not happen, along with its gradients."""
        self.load = None

    def step(self, load: Tensor) -> None:
        """Update the bias by the load [E] of all ranks and reset the count. The bias of an idle layer is unchanged."""
        self.bias += self.rate * torch.sign(load.mean() - load)
        self.load = None

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> nn.Module:
        bias = self.bias
        super()._apply(fn, *args, **kwargs)
        self.bias = bias.to(self.bias.device)  # .half() would round away the small steps
        return self


def update_selection_biases(model: nn.Module) -> None:
    """Update every selection bias of the model by the loads of all ranks; call once per optimizer step, on every rank.

    A collective of the default process group, if there is one; a no-op for a model without selection biases.
    """
    balancers = [module for module in model.modules() if isinstance(module, SelectionBias)]
    if not balancers:
        return
    loads = [torch.zeros_like(b.bias) if b.load is None else b.load.to(b.bias.dtype) for b in balancers]
    total = torch.stack(loads)  # [layers, E]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    for balancer, load in zip(balancers, total):
        balancer.step(load)


def reset_loads(model: nn.Module) -> None:
    """Discard the loads of a failed step, along with its gradients."""
    for module in model.modules():
        if isinstance(module, SelectionBias):
            module.forget()
