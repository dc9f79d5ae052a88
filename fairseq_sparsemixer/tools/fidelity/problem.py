"""The question put to the estimators: tokens, router logits, every expert's output, and the downstream loss of each token.

S tokens, E experts, M model dimension. One expert a token; a token's loss depends on its own output alone, so that the
objective, the sum over tokens of E_{D~pi}[g(pi_D f_D)], has a gradient that can be enumerated token by token.
"""

from dataclasses import dataclass, replace
from typing import Callable, Optional

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """All tensors are float64.

    tokens: [S, I] the router's input. logits: [S, E]. outputs: [S, E, M] what each expert makes of each token.
    loss: y [..., S, M] -> g(y) [..., S], the downstream loss of each token.
    jitter_eps: experts are masked as SparseMixer masks them; None or infinity leaves all of them in.
    description: what it is, in words.
    """

    tokens: Tensor
    logits: Tensor
    outputs: Tensor
    loss: Callable[[Tensor], Tensor]
    jitter_eps: Optional[float] = None
    description: str = ""

    @property
    def mask_eps(self) -> float:
        """The jitter as the gates take it: infinite where nothing is masked."""
        return float("inf") if self.jitter_eps is None else self.jitter_eps

    @property
    def masked(self) -> bool:
        """Whether experts are masked at all."""
        return self.jitter_eps is not None and self.jitter_eps != float("inf")

    def loss_of(self, expert_index: Tensor, weight: Tensor) -> Tensor:
        """Losses [..., S] when token s gets expert expert_index [..., S] times weight [..., S]."""
        chosen = self.outputs[torch.arange(len(self.outputs)), expert_index]  # [..., S, M]
        return self.loss(weight.unsqueeze(-1) * chosen)

    def scaled(self, step: float) -> "Problem":
        """The same with every expert's output, and so the ODE step a = pi_i f_i, multiplied by `step`."""
        return replace(self, outputs=self.outputs * step)
