"""BASE layers (Lewis et al., 2021; arXiv 2103.16716): balanced assignment of tokens to experts in training.

The logits are a_se = h_s . w_e. In training, the experts of a batch's tokens solve the linear assignment problem

    maximise sum_s a_{s, e(s)},  each expert taking at most ceil(S / E) tokens                          (Eqs. 3, 4)

and at inference each token takes its best expert (Eq. 6). The output is scaled by sigmoid(a_{s, e(s)}) (Eq. 2), through
which the router learns. No auxiliary loss is needed. The assignment covers the tokens of one rank, by an auction on the
tokens' device (fairseq's compiled libbase, within 2% of the score range per token) or exactly on the CPU (scipy). The
auction is slow if experts have few places, scipy if there are many tokens. On one core, the auction takes 11 s and scipy
0.04 s for 64 tokens and 1,024 experts; 0.08 s and 4 s for 4,096 tokens and 64 experts. If both are installed, the faster
one is chosen by size.
"""

from importlib import import_module
from typing import Callable, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.gates.gate import Gate, hide_padding
from fairseq_sparsemixer.moe.gates.losses import router_z_loss
from fairseq_sparsemixer.moe.gates.registry import register_gate
from fairseq_sparsemixer.moe.gates.routing import Routing

Assignment = Callable[[Tensor], Tensor]  # scores [N, E], finite -> expert of each row [N], at most ceil(N / E) rows per expert

FEW_PLACES = 2  # per expert: up to this many, scipy is as fast as the auction
LARGEST = 2.0**100  # the auction can add up scores of this size in float32 any number of times without overflow
SHRINK = 2.0**-28  # scales the largest finite float32 below LARGEST; a power of two, so nothing is rounded
FINEST = 1000.0  # multiple of the score range: farther from zero, the auction's bids are lost to rounding


def assign_by_auction(scores: Tensor) -> Tensor:
    """fairseq's compiled auction, on any device. scores [N, E], finite -> [N] int64."""
    count = len(scores)
    if torch.equal(scores, scores[:1].expand_as(scores)):  # ties cost the auction seconds: fill experts in order of score
        order = scores[0].argsort(descending=True)
        return order[torch.arange(count, device=scores.device) // places_of_an_expert(scores)]
    # if E does not divide the number of rows, pad with rows of zeros
    return _auction(torch.nn.functional.pad(within_reach(scores), (0, 0, 0, -count % scores.size(1))))[:count]


def within_reach(scores: Tensor) -> Tensor:
    """The same preferences [N, E], rescaled so that the auction terminates; ordinary scores are unchanged."""
    low, high = scores.aminmax()
    scale = torch.where(torch.maximum(-low, high) > LARGEST, SHRINK, 1.0)
    low, high = low * scale, high * scale
    far = torch.maximum(-low, high) > FINEST * (high - low)
    return scores * scale - torch.where(far, high, torch.zeros_like(high))


def _auction(scores: Tensor) -> Tensor:
    """assign_by_auction for N divisible by E."""
    libbase = import_module("fairseq.libbase")

    places = len(scores) // scores.size(1)  # of each expert
    rows = libbase.balanced_assignment(scores.contiguous())  # [N], the rows of expert 0, then those of expert 1, ...
    experts = torch.arange(scores.size(1), device=scores.device)
    expert = torch.full_like(rows, -1).scatter_(0, rows, experts.repeat_interleave(places))
    # on ties, the auction may assign one row twice and another not at all: the latter takes the remaining place
    left_out = expert < 0
    room = places - torch.zeros_like(experts).scatter_add_(0, expert.clamp(min=0), (~left_out).to(expert.dtype))
    expert[left_out] = experts.repeat_interleave(room)
    return expert


def assign_by_scipy(scores: Tensor) -> Tensor:
    """scipy's exact solution, on the CPU. scores [N, E], finite -> [N] int64."""
    from scipy.optimize import linear_sum_assignment

    places = places_of_an_expert(scores)
    _, place = linear_sum_assignment(scores.double().cpu().repeat_interleave(places, 1).numpy(), maximize=True)
    return torch.as_tensor(place, device=scores.device).div(places, rounding_mode="floor")


def assign_by_size(scores: Tensor) -> Tensor:
    """Whichever of the two is faster. scores [N, E], finite -> [N] int64."""
    return assign_by_scipy(scores) if places_of_an_expert(scores) <= FEW_PLACES else assign_by_auction(scores)


def places_of_an_expert(scores: Tensor) -> int:
    """ceil(N / E) of scores [N, E]."""
    return -(-len(scores) // scores.size(1))


def works(module: str) -> bool:
    """Whether a module can be imported; one built against another torch or numpy cannot."""
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError, ValueError, AttributeError):
        return False
    return True


def find_assignment() -> Assignment:
    """The installed solver. Raises ValueError if there is none."""
    auction, exact = works("fairseq.libbase"), works("scipy.optimize")
    if not auction and not exact:
        raise ValueError(
            "router=base needs a linear assignment solver: install scipy (pip install scipy),"
            " or a fairseq built with its C++ extensions (fairseq.libbase)"
        )
    return assign_by_size if auction and exact else assign_by_auction if auction else assign_by_scipy


@torch.no_grad()
def balanced_assignment(logits: Tensor, padding_mask: Optional[Tensor], assign: Assignment) -> Tensor:
    """The expert of each token [S, 1] in training; no expert gets more than ceil(S / E) tokens, padding not counted."""
    expert = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    real = torch.arange(len(logits), device=logits.device) if padding_mask is None else (~padding_mask).nonzero().view(-1)
    if len(real) and logits.size(1) > 1:
        expert[real] = assign(torch.nan_to_num(logits[real].float()))
    return expert.unsqueeze(1)


def base_routing(logits: Tensor, padding_mask: Optional[Tensor] = None, assign: Optional[Assignment] = None) -> Routing:
    """One expert per token for logits [S, E], by balanced assignment; without a solver (inference), the arg-max."""
    if assign is None:
        expert_index = logits.argmax(-1, keepdim=True)  # [S, 1]
    else:
        expert_index = balanced_assignment(logits, padding_mask, assign)
    return Routing(
        expert_index=expert_index,
        combine_weight=hide_padding(logits.gather(1, expert_index).sigmoid(), padding_mask),
        aux_losses={"router_z": router_z_loss(logits, padding_mask)},
        probabilities=logits.detach().softmax(-1),
        padding_mask=padding_mask,
    )


@register_gate("base")
class BaseGate(Gate):
    """The gate of BASE layers; its projection holds the experts' embeddings, initialised orthogonal as in fairseq's BaseLayer.

    Raises ValueError if neither fairseq's libbase nor scipy is installed.
    """

    def __init__(self, model_dim: int, num_experts: int):
        super().__init__(model_dim, num_experts)
        self.assign = find_assignment()
        torch.nn.init.orthogonal_(self.projection.weight, gain=0.1)

    def weigh(self, logits: Tensor, expert_index: Tensor, skipped: Optional[Tensor] = None) -> Tensor:
        """See Gate: the sigmoid."""
        return logits.gather(1, expert_index).sigmoid()

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See base_routing."""
        return base_routing(logits, padding_mask, self.assign if self.training else None)
