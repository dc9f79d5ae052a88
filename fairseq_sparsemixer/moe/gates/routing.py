"""A gate's decision: the Routing of S tokens to k of E experts, and its statistics."""

import functools
from dataclasses import dataclass, field, replace
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.step_state import Amount, StepState


class DefaultOutputs(NamedTuple):
    """What experts that do not run contribute to the layer's output: weight [S, E] @ vectors [E, M] (default_moe).

    weight: 0 for experts that run and for padding, carries the router's gradient. average: is given the sum of each
    expert's outputs and their number [E, M + 1]; None at inference.
    """

    weight: Tensor
    vectors: Tensor
    average: Optional[StepState] = None


@dataclass(frozen=True)
class Routing:
    """The decision of a gate for S tokens.

    expert_index: [S, k] int64, always a valid index, even where nothing is routed.
    combine_weight: [S, k] float32, carries the router's gradient; 0 for padding and dropped tokens.
    aux_losses: unweighted differentiable scalars by name ("balance", "router_z", ...).
    probabilities: [S, E] float32, detached: the distribution the gate chose by.
    padding_mask: [S] bool, True = padding; None if there is none.
    dropped: [S, k] bool, True where a choice exceeded the expert's capacity; None if the gate drops nothing.
    skipped: [S, k] bool, True where a column is not a choice, for gates that give tokens different numbers of experts
        (expert_choice, gshard's policy random); None if every column is a choice.
    num_chosen: the number of leading columns that are the gate's choice; the rest run only for the gradient, with weight
        zero (dense_st). None: all columns.
    output_scale: [M], multiplies the combined output (omega of SparseMixer v1); None for other gates.
    max_routed: an upper bound on the choices that run, known on the host without synchronisation; None: S * k.
    default: the default outputs of the experts that do not run (default_moe); None for other gates.
    amount: what the backward of combine_weight adds to the gate's state, for gates that may give a whole batch no expert: there
        combine_weight has no gradient, so the layer lets the backward of its output add the amount. None for other gates.
    cmr_gate: [S] float32, the layer's share in its own output beside a shared network (cmr.py), 0 at padding; carries the
        gradient. The layer adds it; None without CMR.
    tokens: [S, M], the gate's tokens for the experts to take, if the fused projection adds up the gradients of both uses; the
        layer takes them out. None: those that the gate was given.
    """

    expert_index: Tensor
    combine_weight: Tensor
    aux_losses: Dict[str, Tensor] = field(default_factory=dict)
    probabilities: Tensor = None  # type: ignore[assignment]  # every gate gives them; a default as the field before has one
    padding_mask: Optional[Tensor] = None
    dropped: Optional[Tensor] = None
    output_scale: Optional[Tensor] = None
    num_chosen: Optional[int] = None
    skipped: Optional[Tensor] = None
    max_routed: Optional[int] = None
    default: Optional[DefaultOutputs] = None
    amount: Optional[Amount] = None
    cmr_gate: Optional[Tensor] = None
    tokens: Optional[Tensor] = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probabilities.size(-1)

    def unrouted(self) -> Optional[Tensor]:
        """[S, k] bool, True where no expert runs (padding, dropped or skipped); None if every choice runs."""
        padding = None if self.padding_mask is None else self.padding_mask.unsqueeze(-1).expand_as(self.expert_index)
        masks = [mask for mask in (padding, self.dropped, self.skipped) if mask is not None]
        return functools.reduce(torch.logical_or, masks) if masks else None

    def num_real_tokens(self) -> Tensor:
        """Scalar int64: the number of tokens, padding excluded."""
        if self.padding_mask is None:
            # torch.tensor would copy from the host and synchronise
            return torch.full((), len(self.expert_index), dtype=torch.int64, device=self.expert_index.device)
        return (~self.padding_mask).sum()

    def watched(self, amount: Amount) -> "Routing":
        """The routing whose backward adds the amount, also if no expert takes a token; see `amount`."""
        return replace(self, combine_weight=amount.watch(self.combine_weight), amount=amount)

    def queue_positions(self, arrival: Optional[Tensor] = None) -> Tensor:
        """[S, k] int64: the position of each routed choice in its expert's queue, from 0; undefined where nothing runs.

        arrival: [k * S], the order in which choices j * S + s arrive. None is GShard's order: the first choices of all tokens,
        by position, then the second choices, and so on.
        """
        unrouted = self.unrouted()
        expert = self.expert_index if unrouted is None else self.expert_index.masked_fill(unrouted, self.num_experts)
        expert = expert.t().reshape(-1)  # [k * S], choice by choice
        order = expert.argsort(stable=True) if arrival is None else arrival[expert[arrival].argsort(stable=True)]
        counts = expert.new_zeros(self.num_experts + 1).scatter_add_(0, expert, torch.ones_like(expert))
        first = counts.cumsum(0) - counts  # start of each expert's choices in `order`
        place = torch.arange(len(expert), device=expert.device) - first[expert[order]]
        return torch.empty_like(place).scatter_(0, order, place).view(self.expert_index.size(1), -1).t()

    def to_fairscale(self, capacity: Optional[int] = None) -> Tuple[Tensor, Tensor, Tensor]:
        """fairscale's gate output: (l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C]).

        capacity: C, by default the largest load of an expert, at least 1; choices beyond it are left out. l_aux is on
        fairscale's scale, the mean over experts of share times probability: the balance loss / E^2, or 0 for a gate
        without one. This format cannot express output_scale [M] and default outputs: the caller must apply them.
        """
        position = self.queue_positions()  # [S, k]
        unrouted = self.unrouted()
        routed = torch.ones_like(position, dtype=torch.bool) if unrouted is None else ~unrouted
        if capacity is None:
            capacity = max(int(position.add(1).mul(routed).max()) if position.numel() else 0, 1)
        routed = routed & (position < capacity)
        slot = (self.expert_index * capacity + position.clamp(max=capacity - 1)).masked_fill(~routed, 0)  # in [0, E * C)
        shape = (len(position), self.num_experts, capacity)
        flat = self.combine_weight.new_zeros(len(position), self.num_experts * capacity)
        combine = flat.scatter_add(1, slot, self.combine_weight.masked_fill(~routed, 0))
        mask = torch.zeros_like(flat).scatter_add_(1, slot, routed.to(flat.dtype)) > 0
        balance = self.aux_losses.get("balance", self.combine_weight.new_zeros(()))
        return balance / self.num_experts**2, combine.view(shape), mask.view(shape)

    @torch.no_grad()
    def statistics(self) -> Dict[str, Tensor]:
        """Sums over tokens, padding excluded; additive over batches, ranks and gradient accumulation.

        tokens: scalar. load: [k, E] tokens routed to each expert by each choice, dropped ones excluded.
        chosen: [k, E] the same before dropping. entropy: scalar, sum of the gate's entropies, in nats.
        argmax: scalar, tokens whose first choice is the most probable expert. dropped: [k]. cmr_gate: scalar, with CMR.
        If tokens skip columns (expert_choice), all columns count as one choice, and dropped counts the tokens without
        any expert.
        """
        real = self._real()
        chosen = self.chosen_count()
        load = chosen
        dropped = chosen.new_zeros(chosen.size(0))
        if self.dropped is not None and self.skipped is not None:
            lost = self._count(self.dropped.to(real.dtype) * real.unsqueeze(-1))
            load = chosen - lost.sum(0, keepdim=True)
        elif self.dropped is not None:
            lost = self.dropped[:, : chosen.size(0)].to(real.dtype) * real.unsqueeze(-1)
            load, dropped = chosen - self._count(lost), lost.sum(0)
        is_argmax = self.probabilities.gather(1, self.expert_index[:, :1]).squeeze(1) >= self.probabilities.amax(1)
        if self.skipped is not None:
            is_argmax = is_argmax & ~self.skipped[:, 0]
            without = self.skipped if self.dropped is None else self.skipped | self.dropped
            dropped = (without.all(1).to(real.dtype) * real).sum().view(1)
        entropy = torch.special.entr(self.probabilities).sum(-1)
        of_cmr = {} if self.cmr_gate is None else {"cmr_gate": self.cmr_gate.sum()}
        return {
            **of_cmr,
            "tokens": real.sum(),
            "load": load,
            "chosen": chosen,
            "entropy": torch.where(real > 0, entropy, torch.zeros_like(entropy)).sum(),
            "argmax": (is_argmax.to(real.dtype) * real).sum(),
            "dropped": dropped,
        }

    @torch.no_grad()
    def chosen_count(self) -> Tensor:
        """[k, E]: the tokens that chose each expert, per choice, padding excluded; [1, E] if tokens skip columns."""
        k = self.expert_index.size(1) if self.num_chosen is None else self.num_chosen
        weight = self._real().unsqueeze(-1).expand(-1, k)
        if self.skipped is not None:
            return self._count(weight * (~self.skipped).to(weight.dtype)).sum(0, keepdim=True)
        return self._count(weight)

    def _real(self) -> Tensor:
        """[S]: 1 for tokens, 0 for padding."""
        real = self.probabilities.new_ones(len(self.expert_index))
        return real if self.padding_mask is None else real.masked_fill(self.padding_mask, 0)

    def _count(self, weight: Tensor) -> Tensor:
        """[k, E]: the weights [S, k] summed by choice and expert. Sums of ones below 2**24 are exact in any order."""
        counts = weight.new_zeros(weight.size(1), self.num_experts)
        return counts.scatter_add_(1, self.expert_index[:, : weight.size(1)].t(), weight.t())
