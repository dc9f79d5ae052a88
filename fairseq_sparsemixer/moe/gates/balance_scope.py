"""The tokens over which a gate's balance loss is computed (--balance-scope).

A balance loss is a function of sums over tokens, such as how many an expert got and the sum of its probabilities. A scope says
which tokens a sum runs over: `own` sums those of this forward, and `total` adds those of other ranks or micro-batches.
Without a scope, these are the tokens of the forward.
"""

from typing import Any, Dict, List, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import RankGroup, SumOverRanks


class BalanceScope:
    """The tokens of one forward."""

    spans_forwards = False  # whether `total` adds anything

    def segments(self, num_tokens: int, device: torch.device) -> Optional[Tensor]:
        """The sequence of each token [S], counted from 0, if every sequence has a loss of its own; else None."""
        return None

    def own(self, values: Tensor) -> Tensor:
        """values [S, ...] -> their sum over this forward's tokens [...], or over those of each sequence [B, ...]."""
        return values.sum(0)

    def total(self, own: Tensor) -> Tensor:
        """The sum over all tokens of the scope, from this forward's; differentiable."""
        return own

    def restart(self, num_sequences: int) -> None:
        """Called before each forward, of tokens [S] that are a flattened [T, num_sequences]."""

    def of_model(self) -> "BalanceScope":
        """The scope of a loss of all layers together; called once after each forward of the model."""
        return self


class RanksScope(BalanceScope):
    """The tokens of one micro-batch of every rank (`global`). Sums are collectives, in forward and backward."""

    spans_forwards = True

    def __init__(self, group: Any):
        self.group = group if isinstance(group, RankGroup) else RankGroup(group)

    def total(self, own: Tensor) -> Tensor:
        """See BalanceScope."""
        total: Tensor = SumOverRanks.apply(own, self.group)
        return total


class SequenceScope(BalanceScope):
    """Each sequence for itself (`sequence`; DeepSeek-V3, arXiv 2412.19437, Eq. 17): the mean of the sequences' losses."""

    num_sequences = 1

    def restart(self, num_sequences: int) -> None:
        """See BalanceScope."""
        self.num_sequences = max(num_sequences, 1)  # a batch may be empty

    def segments(self, num_tokens: int, device: torch.device) -> Optional[Tensor]:
        """See BalanceScope."""
        return torch.arange(num_tokens, device=device).remainder(self.num_sequences)

    def own(self, values: Tensor) -> Tensor:
        """See BalanceScope."""
        return values.view(-1, self.num_sequences, *values.shape[1:]).sum(0)


class Update:
    """One update of a model: its micro-batches on all ranks, whose sums are counted before the update's trainings.

    group: all ranks; None for a single process. sample_size: fairseq's, of all micro-batches on all ranks, once counted.
    """

    def __init__(self, group: Optional[RankGroup] = None):
        self.group = group
        self.scopes: List["UpdateScope"] = []
        self.counting = self.counted = False
        self.sample_size: Any = 0
        self.together = self.scope()  # of all layers: a gate's own may be skipped by LayerDrop

    def scope(self) -> "UpdateScope":
        """The scope of one more gate."""
        self.scopes.append(UpdateScope(self))
        return self.scopes[-1]

    def start_counting(self) -> None:
        """From now on, forwards add to the sums; they need no gradients."""
        self.end()
        self.counting = True

    def finish_counting(self) -> None:
        """From now on, a gate's sums are those of all micro-batches counted, on all ranks: one collective."""
        sums = [each for scope in self.scopes for each in scope.sums]
        if not sums:  # a router without a balance loss
            return self.end()
        size = torch.as_tensor(self.sample_size, dtype=torch.float64).to(sums[0].device)
        flat = torch.cat([size.reshape(1), *(each.reshape(-1).double() for each in sums)])  # counts stay exact
        if self.group is not None:
            dist.all_reduce(flat, group=self.group.handle)
        self.sample_size, *totals = flat.split([1, *(each.numel() for each in sums)])
        for each, total in zip(sums, totals):
            each.copy_(total.view(each.shape))
        self.counting, self.counted = False, True

    def end(self) -> None:
        """Forget the sums: until the next counting, every micro-batch stands alone."""
        self.counting = self.counted = False
        self.sample_size = 0
        for scope in self.scopes:
            scope.sums = []

    def weigh(self, sample_size: Any, idle: bool) -> Any:
        """What a criterion multiplies the balance loss of a micro-batch of this sample_size by.

        Once counted, a micro-batch's loss is that of the whole update, with the gradient of its own tokens. It then has the
        weight of the whole update. `idle`: the micro-batch is fairseq's dummy for a rank without data.
        """
        if self.counting and not idle:
            self.sample_size = self.sample_size + sample_size
        return self.sample_size.to(torch.float32) if self.counted else sample_size


class UpdateScope(BalanceScope):
    """The tokens of a whole update: all micro-batches of all ranks (`update`).

    The sums of one forward are told apart by their order. Between updates, as for RanksScope, or for one forward alone.
    """

    spans_forwards = True

    def __init__(self, update: Update):
        self.update = update
        self.sums: List[Tensor] = []
        self.position = 0

    def restart(self, num_sequences: int) -> None:
        """See BalanceScope."""
        self.position = 0

    def of_model(self) -> "UpdateScope":
        """See BalanceScope."""
        together = self.update.together
        together.restart(1)
        return together

    def total(self, own: Tensor) -> Tensor:
        """See BalanceScope. Once counted, the value is the update's, and the gradient that of this micro-batch's tokens."""
        update, position = self.update, self.position
        self.position += 1
        if update.counting:
            if position == len(self.sums):
                self.sums.append(torch.zeros_like(own))
            self.sums[position] += own.detach()
        if update.counted:
            return self.sums[position] + (own - own.detach())
        if update.group is None or update.counting:
            return own
        total: Tensor = SumOverRanks.apply(own, update.group)
        return total

    def __deepcopy__(self, memo: Dict[int, Any]) -> "UpdateScope":
        return self  # fairseq's EMA copies models; a copy is never trained
