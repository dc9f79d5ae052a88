"""What a gate decides: the Routing of S tokens to k of E experts, and the statistics read off it."""

from dataclasses import dataclass, field
from typing import Dict, Optional

import torch
from torch import Tensor


@dataclass
class Routing:
    """The decision of a gate for S tokens.

    expert_index: [S, k] int64, always a valid index, also where nothing is routed.
    combine_weight: [S, k] float32, carries the router's gradient; 0 for padding and dropped tokens.
    aux_losses: unweighted scalars by name ("balance", "router_z", ...), each with its gradient.
    probabilities: [S, E] float32, detached: the distribution the gate chose by.
    padding_mask: [S] bool, True = padding; None when there is none.
    dropped: [S, k] bool, True where a choice did not fit in the expert's capacity; None when the gate drops nothing.
    num_chosen: the first columns that are the gate's choice; columns behind them run for the gradient's sake, at weight
        zero (dense_st). None: all are.
    output_scale: [M], multiplies the combined output (omega of SparseMixer v1); None for other gates.
    """

    expert_index: Tensor
    combine_weight: Tensor
    aux_losses: Dict[str, Tensor] = field(default_factory=dict)
    probabilities: Optional[Tensor] = None
    padding_mask: Optional[Tensor] = None
    dropped: Optional[Tensor] = None
    output_scale: Optional[Tensor] = None
    num_chosen: Optional[int] = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probabilities.size(-1)

    def unrouted(self) -> Optional[Tensor]:
        """[S, k] bool, True where no expert runs (padding or dropped); None when every choice runs."""
        padding = None if self.padding_mask is None else self.padding_mask.unsqueeze(-1).expand_as(self.expert_index)
        if padding is None or self.dropped is None:
            return padding if self.dropped is None else self.dropped
        return padding | self.dropped

    @torch.no_grad()
    def statistics(self) -> Dict[str, Tensor]:
        """Sums over the tokens that are not padding; they add up over batches, ranks and gradient accumulation.

        tokens: scalar. load: [k, E] tokens given to each expert by each choice, dropped ones not counted.
        chosen: [k, E] the same before dropping. entropy: scalar, sum of the entropies of the gate, in nats.
        argmax: scalar, tokens whose first choice is the most probable expert. dropped: [k].
        """
        k = self.expert_index.size(1) if self.num_chosen is None else self.num_chosen
        real = self.probabilities.new_ones(len(self.expert_index))
        if self.padding_mask is not None:
            real = 1 - self.padding_mask.to(real.dtype)
        kept = real.unsqueeze(-1).expand(-1, k)
        chosen = self._count(kept)
        if self.dropped is not None:
            kept = kept * (~self.dropped[:, :k]).to(kept.dtype)
        load = chosen if self.dropped is None else self._count(kept)
        entropy = torch.special.entr(self.probabilities).sum(-1)
        is_argmax = self.probabilities.gather(1, self.expert_index[:, :1]).squeeze(1) >= self.probabilities.amax(1)
        return {
            "tokens": real.sum(),
            "load": load,
            "chosen": chosen,
            "entropy": torch.where(real > 0, entropy, torch.zeros_like(entropy)).sum(),
            "argmax": (is_argmax.to(real.dtype) * real).sum(),
            "dropped": (chosen - load).sum(1),
        }

    def _count(self, weight: Tensor) -> Tensor:
        """[k, E]: the weights [S, k] added up by choice and expert. Sums of ones below 2**24: exact in any order."""
        counts = weight.new_zeros(weight.size(1), self.num_experts)
        return counts.scatter_add_(1, self.expert_index[:, : weight.size(1)].t(), weight.t())
