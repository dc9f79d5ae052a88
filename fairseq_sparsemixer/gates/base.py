"""BASE layers (Lewis et al., 2021; arXiv 2103.16716): in training, the assignment of tokens to experts is balanced.

The logits are a_se = h_s . w_e. In training the experts of a batch solve the linear assignment

    maximise sum_s a_{s, e(s)},  each expert taking at most ceil(S / E) tokens                          (Eqs. 3, 4)

and at inference each token takes its best expert (Eq. 6). The output is scaled by sigmoid(a_{s, e(s)}) (Eq. 2), through
which the router learns. No auxiliary loss is needed. The assignment is over the tokens of one rank; at S tokens it costs
about S^2 on the CPU (scipy), or an auction on the tokens' device (fairseq's compiled libbase, within 2% of each score).
"""

from typing import Callable, Optional

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.gates.gate import Gate, hide_padding
from fairseq_sparsemixer.gates.losses import router_z_loss
from fairseq_sparsemixer.gates.registry import register_gate
from fairseq_sparsemixer.gates.routing import Routing

Assignment = Callable[[Tensor], Tensor]  # scores [N, E] -> expert of each row [N], N / E rows for each


def assign_by_auction(scores: Tensor) -> Tensor:
    """fairseq's compiled auction, on any device. scores [N, E], N divisible by E, finite -> [N] int64."""
    from fairseq import libbase

    places = len(scores) // scores.size(1)  # of each expert
    rows = libbase.balanced_assignment(scores.contiguous())  # [N], the rows of expert 0, then those of expert 1, ...
    experts = torch.arange(scores.size(1), device=scores.device)
    expert = torch.full_like(rows, -1).scatter_(0, rows, experts.repeat_interleave(places))
    # where scores tie, the auction may end with one row won twice and another not at all: that one takes the place left
    left_out = expert < 0
    room = places - torch.zeros_like(experts).scatter_add_(0, expert.clamp(min=0), (~left_out).to(expert.dtype))
    expert[left_out] = experts.repeat_interleave(room)
    return expert


def assign_by_scipy(scores: Tensor) -> Tensor:
    """scipy's exact solution, on the CPU. scores [N, E], N divisible by E, finite -> [N] int64."""
    from scipy.optimize import linear_sum_assignment

    places = len(scores) // scores.size(1)  # of each expert
    _, place = linear_sum_assignment(scores.double().cpu().repeat_interleave(places, 1).numpy(), maximize=True)
    return torch.as_tensor(place, device=scores.device).div(places, rounding_mode="floor")


def find_assignment() -> Assignment:
    """The solver at hand. Raises ConfigurationError when there is none."""
    try:
        from fairseq import libbase  # noqa: F401

        return assign_by_auction
    except ImportError:
        pass
    try:
        import scipy.optimize  # noqa: F401

        return assign_by_scipy
    except ImportError:
        raise ConfigurationError(
            "--router base needs a solver of the linear assignment: install scipy (pip install scipy),"
            " or a fairseq built with its C++ extensions (fairseq.libbase)"
        ) from None


@torch.no_grad()
def balanced_assignment(logits: Tensor, padding_mask: Optional[Tensor], assign: Assignment) -> Tensor:
    """The expert of each token [S, 1] in training; no expert gets more than ceil(S / E) of the tokens that are not padding.

    Rows of zeros fill up the last places where E does not divide the tokens.
    """
    expert = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    real = torch.arange(len(logits), device=logits.device) if padding_mask is None else (~padding_mask).nonzero().view(-1)
    if len(real) and logits.size(1) > 1:
        scores = torch.nan_to_num(logits[real].float())
        scores = torch.nn.functional.pad(scores, (0, 0, 0, -len(real) % logits.size(1)))
        expert[real] = assign(scores)[: len(real)]
    return expert.unsqueeze(1)


def base_routing(logits: Tensor, padding_mask: Optional[Tensor] = None, assign: Optional[Assignment] = None) -> Routing:
    """One expert a token of logits [S, E], by the balanced assignment; without a solver (inference), the best one."""
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
    """The gate of BASE layers; its projection is the experts' embeddings, orthogonal at first as in fairseq's BaseLayer.

    Raises ConfigurationError when neither fairseq's libbase nor scipy is there.
    """

    def __init__(self, model_dim: int, num_experts: int):
        super().__init__(model_dim, num_experts)
        self.assign = find_assignment()
        torch.nn.init.orthogonal_(self.projection.weight, gain=0.1)

    def decide(self, logits: Tensor, padding_mask: Optional[Tensor] = None) -> Routing:
        """See base_routing."""
        return base_routing(logits, padding_mask, self.assign if self.training else None)
