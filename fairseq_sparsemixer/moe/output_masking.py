"""Masks of a layer's outputs: EOM and FOM (Elbayad et al., 2022; arXiv 2212.07571), as in fairseq's branch nllb.

f_i(x): the output of expert i, w_i: its combine weight, y: the layer's output, b and c: independent coins, 0 with probability P.

                                     training                     inference
    expert output masking (EOM)      sum_i b_i w_i f_i(x)         (1 - P) sum_i w_i f_i(x)
    final output masking (FOM)       c y                          (1 - P) y

b is drawn for each pair of a token and its expert, c for each token. Unlike dropout, the masks do not scale up what remains
in training. The numbers come from torch's random state: ranks draw different masks, and a recomputation the same again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, require_probability
from fairseq_sparsemixer.moe.gates.routing import Routing


def require_masking(gate: Gate, eom: float, fom: float) -> None:
    """Raise ValueError, naming the option, for probabilities outside [0, 1), or a gate whose experts EOM cannot mask."""
    require_probability("fom", fom, "masks nothing")
    if require_probability("eom", eom, "masks nothing") and gate.has_defaults:
        raise ValueError(
            f"eom={eom} does not work with router={gate.router}, in which experts that do not run have an output, too; leave it"
            " out, or choose another router"
        )


def mask_experts(routing: Routing, probability: float, training: bool) -> Routing:
    """EOM: the routing with combine weights [S, k] masked in training, scaled at inference."""
    if not probability:
        return routing
    weight = routing.combine_weight
    return replace(routing, combine_weight=_masked(weight, weight, probability, training))


def mask_output(output: Tensor, probability: float, training: bool) -> Tensor:
    """FOM: output [S, M] with rows masked in training, scaled at inference."""
    return _masked(output, output[:, :1], probability, training) if probability else output


def _masked(values: Tensor, like: Tensor, probability: float, training: bool) -> Tensor:
    """`values`, zero where a coin is; a coin for each entry of `like`, which broadcasts to values. At inference, scaled."""
    if not training:
        return values * (1 - probability)
    coin = torch.rand(like.shape, device=like.device)  # float32: half precision would round small probabilities
    return values.masked_fill(coin < probability, 0)
