"""Low-rank adapters of experts (LoRA, arXiv 2106.09685): the weights W of each expert stay, and W + s A B is trained by A and B.

s = alpha / R. A is drawn as the first weights are and B is zero, so that the function is unchanged at first (section 4.1).
The sum is formed for all experts in each forward, so that every path of feed_forward.py and grouped.py takes it as it is.
"""

import math
from typing import Dict, Optional

import torch
from torch import Tensor, nn

PARTS = ("in", "out")  # of the weights weight_in and weight_out
A, B = "lora_{}_a", "lora_{}_b"  # names of the parameters, [E, n, R] and [E, R, m] for weights [E, n, m]


def adapters(weights: Dict[str, Tensor], rank: int) -> Dict[str, nn.Parameter]:
    """New adapters of rank R for `weight_in` and `weight_out` [E, n, m], by name. Raises ValueError for R below 1."""
    if rank < 1:
        raise ValueError(f"expert_lora_rank={rank} must be at least 1")
    new = {}
    for part in PARTS:
        weight = weights[f"weight_{part}"]
        experts, inputs, outputs = weight.shape
        bound = 1 / math.sqrt(inputs)
        new[A.format(part)] = nn.Parameter(weight.new_empty(experts, inputs, rank).uniform_(-bound, bound))
        new[B.format(part)] = nn.Parameter(weight.new_zeros(experts, rank, outputs))
    return new


def scale_of(rank: int, alpha: Optional[float]) -> float:
    """s; alpha=None is R."""
    return 1.0 if alpha is None else alpha / rank


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s A B, [E, n, m], for W [E, n, m], A [E, n, R] and B [E, R, m]."""
    return torch.baddbmm(weight, a, b, alpha=scale)
