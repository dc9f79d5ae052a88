"""The problem that estimators are measured on: tokens, router logits, all experts' outputs, and each token's downstream loss.

S tokens, E experts, M model dimension. One expert per token; a token's loss depends only on its own output. So the
gradient of the objective, the sum over tokens of E_{D~pi}[g(pi_D f_D)], can be enumerated token by token.
"""

from dataclasses import dataclass, replace
from typing import Callable, Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """All tensors are float64.

    tokens: [S, I], the router's input. logits: [S, E]. outputs: [S, E, M], of each expert for each token.
    loss: y [..., S, M] -> g(y) [..., S], the downstream loss of each token.
    jitter_eps: mask experts as SparseMixer does with this jitter; None or infinity: no mask.
    description: for reports.
    """

    tokens: Tensor
    logits: Tensor
    outputs: Tensor
    loss: Callable[[Tensor], Tensor]
    jitter_eps: Optional[float] = None
    description: str = ""

    @property
    def mask_eps(self) -> float:
        """The jitter as the gates take it: infinity for no mask."""
        return float("inf") if self.jitter_eps is None else self.jitter_eps

    @property
    def masked(self) -> bool:
        """Whether there is a mask."""
        return self.jitter_eps is not None and self.jitter_eps != float("inf")

    def loss_of(self, expert_index: Tensor, weight: Tensor) -> Tensor:
        """Losses [..., S] if each token's output is that of expert_index [..., S] times weight [..., S]."""
        chosen = self.outputs[torch.arange(len(self.outputs)), expert_index]  # [..., S, M]
        return self.loss(weight.unsqueeze(-1) * chosen)

    def scaled(self, step: float) -> "Problem":
        """The same problem with all expert outputs, and so the ODE step a = pi_i f_i, multiplied by `step`."""
        return replace(self, outputs=self.outputs * step)
