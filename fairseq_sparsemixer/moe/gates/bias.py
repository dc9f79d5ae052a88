"""Auxiliary-loss-free load balancing (Wang et al., 2024, arXiv 2408.15664; DeepSeek-V3, arXiv 2412.19437).

Each expert has a bias b_e that is added to its logit for selection only: combine weights and their gradients do not
depend on it. After every optimizer step

    b_e <- b_e + rate * sign(mean load - load_e),

where load_e is the number of tokens that chose e in that step, over all micro-batches and ranks. The papers add the bias
to sigmoid scores; here it is added to the logits, so that arg-max, top-k and sampled selection can all use it.
"""

import math

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.step_state import StepState


class SelectionBias(StepState):
    """The bias [E] of one gate. Raises ValueError if the rate is negative or not finite."""

    bias: Tensor

    def __init__(self, num_experts: int, rate: float):
        super().__init__(num_experts)
        if not 0 <= rate < math.inf:
            raise ValueError(f"bias_update_rate={rate} must be at least 0 and finite; DeepSeek-V3 uses 0.001, and 0 disables it")
        self.rate = rate
        self.register_buffer("bias", torch.zeros(num_experts))

    def watch_load(self, routing: Routing) -> Tensor:
        """The routing's combine_weight; its backward counts the tokens that chose each expert, dropped or not."""
        return self.watch(routing.combine_weight, routing.chosen_count().sum(0))

    def step(self, total: Tensor) -> None:
        """Update the bias by the load [E] of all ranks. The bias of an idle layer is unchanged."""
        self.bias += self.rate * torch.sign(total.mean() - total)
