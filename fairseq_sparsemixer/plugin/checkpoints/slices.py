"""The experts made of a dense feed-forward layer: copies of it, or of its slices, in part drawn anew.

Granular upcycling (arXiv 2410.07524) cuts the H hidden units of the dense layer into G slices, whose outputs add up to its
own. Expert e of N is a copy of slice e % G with H / G hidden units. G consecutive experts, one of each slice, are a virtual
group, whose sum is the dense layer; starting_gates.py makes the router choose whole groups.

Drop-upcycling (arXiv 2502.19261) draws a share r of each expert's hidden units anew: the weights into and out of a unit, from
normal distributions with the mean and standard deviation of those that they replace.
"""

import math
from typing import Dict, NamedTuple, Sequence

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError

HIDDEN = {"weight_in": 1, "bias_in": 0, "weight_out": 0}  # the dimension of hidden units in the tensors of one expert


class Change(NamedTuple):
    """How experts differ from copies of the dense layer.

    noise: standard deviation of the noise added to each weight matrix, relative to its own. seed: of all that is drawn, the
    router included. granularity: G. reinitialised: r.
    """

    noise: float = 0.0
    seed: int = 1
    granularity: int = 1
    reinitialised: float = 0.0


AS_IT_IS = Change()


def refuse_change(change: Change) -> None:
    """Raise ConfigurationError for numbers out of range."""
    if not 0 <= change.noise < math.inf:
        raise ConfigurationError(f"--noise {change.noise} must be at least 0 and finite; give 0 for none")
    if not 0 <= change.reinitialised <= 1:
        raise ConfigurationError(f"--reinitialise {change.reinitialised} must be at least 0 and at most 1; 0.5 is the paper's")


def make_experts(dense: Dict[str, Tensor], num_experts: int, change: Change) -> Dict[str, Tensor]:
    """fc1 [H, M] and fc2 [M, H] -> the tensors of Experts with H / G hidden units each."""
    groups, count = num_experts // change.granularity, change.granularity

    def copies(weight: Tensor, of_one: Sequence[int]) -> Tensor:
        """Slices [G, ...] -> [N, ...], with noise."""
        stacked = weight.repeat(groups, *[1] * len(of_one))
        return stacked + change.noise * weight.std() * torch.randn_like(stacked) if change.noise else stacked

    hidden, model_dim = dense["fc1.weight"].shape
    width = hidden // count
    weight_in = dense["fc1.weight"].view(count, width, model_dim).transpose(1, 2)  # [G, M, H / G]
    weight_out = dense["fc2.weight"].t().reshape(count, width, model_dim)
    experts = {
        "weight_in": copies(weight_in, weight_in.shape[1:]),
        "bias_in": dense["fc1.bias"].view(count, width).repeat(groups, 1),
        "weight_out": copies(weight_out, weight_out.shape[1:]),
        "bias_out": (dense["fc2.bias"] / count).repeat(num_experts, 1),
    }
    for expert in range(num_experts):
        reinitialise({name: value[expert] for name, value in experts.items()}, change.reinitialised)
    return experts


def reinitialise(expert: Dict[str, Tensor], share: float) -> None:
    """Draw this share of the hidden units of one expert anew, in place; see the top of this file.

    A unit of a gated activation has two columns of weight_in, H apart.
    """
    width = expert["weight_out"].size(0)
    units = torch.randperm(width)[: int(share * width + 1e-9)]  # 0.29 of 100 is 29
    if not len(units):
        return
    for name, dim in HIDDEN.items():
        for first in range(0, expert[name].size(dim), width):
            replaced = expert[name].index_select(dim, units + first).float()
            drawn = replaced.mean() + replaced.std(unbiased=False) * torch.randn_like(replaced)
            expert[name].index_copy_(dim, units + first, drawn.to(expert[name].dtype))
