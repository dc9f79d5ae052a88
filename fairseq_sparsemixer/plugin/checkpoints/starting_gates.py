"""Gates with which upcycled experts compute the same as the dense layer that they come from."""

from typing import Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Gate, Routing, build_gate
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.router_options import router_options

TIE_BREAK = 1e-6  # scale of the initial logits: enough for an arg-max to spread tokens, too small to change a multiplier
SMALL = 1e-2  # the same for groups of experts with equal logits, which must not tie with other groups
PROBES = 64  # random tokens on which a router's multiplier is measured
MANY_PROBES = 4096  # for groups, which may be mixed for few tokens
TOLERANCE = 1e-5  # relative difference of the multiplier allowed between tokens


class Indifferent(NamedTuple):
    """A gate that gives all experts the same weight, and its multiplier of the dense layer.

    spread: the largest relative difference of a token's multiplier; 0 within rounding.
    """

    gate: nn.Module
    multiplier: float
    spread: float = 0.0


def indifferent_gate(model_dim: int, options: MoEOptions) -> Indifferent:
    """A gate of options.router that gives every token the same weight, whichever expert it chooses.

    The gate is unchanged if that already holds (GShard renormalises). Otherwise its logits are tiny, so that an arg-max
    router spreads tokens from the start; or zero for SparseMixer, whose mask compares logits relative to each other (it
    samples, so zero logits spread tokens too). Raises ConfigurationError for a router that weighs tokens unevenly in all
    cases.
    """
    gate, probes = _build(model_dim, options), torch.randn(PROBES, model_dim)
    for size in (None, TIE_BREAK, 0.0):
        _resize(gate, size)
        with torch.no_grad():
            weight = gate(probes).combine_weight.sum(-1)
        if weight.min() > 0 and weight.max() - weight.min() <= TOLERANCE * weight.mean():
            return Indifferent(gate, float(weight.mean()))
    raise ConfigurationError(
        f"--router {options.router} weighs tokens differently even if all experts are equal, so no initialisation equals the"
        " dense model; choose another router"
    )


def group_gate(model_dim: int, options: MoEOptions, granularity: int) -> Indifferent:
    """A gate of options.router that chooses whole virtual groups of G consecutive experts (arXiv 2410.07524).

    The experts of a group have the same row, so that a token's k best are those of its k / G best groups. The weights of the
    chosen copies of each slice then sum to the same. That sum is the multiplier: the same for all tokens if weights are
    normalised over the chosen experts; otherwise logits are small, and it nearly is. Raises ConfigurationError for routers
    that choose or weigh experts in another way.
    """
    gate, probes = _build(model_dim, options), torch.randn(MANY_PROBES, model_dim)
    for size in (None, SMALL):
        _resize(gate, size)
        _share_rows(gate, options.num_experts, granularity)
        with torch.no_grad():
            weight = _weight_by_slice(gate(probes), granularity)  # [S, G]
        whole = weight.min() > 0 and bool((weight.amax(1) - weight.amin(1) <= TOLERANCE * weight.mean(1)).all())
        mean = float(weight.mean())
        spread = float((weight / mean - 1).abs().max())
        if whole and (spread <= TOLERANCE or size == SMALL):
            return Indifferent(gate, mean, spread if spread > TOLERANCE else 0.0)
    raise ConfigurationError(
        f"--granularity {granularity} needs a router that gives a token all {granularity} slices with equal weights; use"
        f" --router topk --moe-top-k {granularity}, or a multiple of {granularity}"
    )


def _build(model_dim: int, options: MoEOptions) -> Gate:
    gate = build_gate(options.router, model_dim, options.num_experts, **router_options(options)).eval()
    if gate(torch.zeros(1, model_dim)).default is not None:
        raise ConfigurationError(
            f"--router {options.router} adds running means of the experts' outputs, which a dense checkpoint does not have;"
            " choose another router"
        )
    return gate


def _resize(gate: nn.Module, size: Optional[float]) -> None:
    """Draw the router's rows anew, so that the logits of normal tokens have this standard deviation; None: leave them."""
    projection = getattr(gate, "projection", None)
    if size is not None and projection is not None:
        nn.init.normal_(projection.weight, std=size / projection.weight.size(1) ** 0.5)


@torch.no_grad()
def _share_rows(gate: nn.Module, num_experts: int, granularity: int) -> None:
    """Give the experts of each virtual group the first one's row in the parameters of the gate."""
    for parameter in gate.parameters():
        if parameter.dim() and parameter.size(0) == num_experts:
            groups = parameter.view(num_experts // granularity, granularity, -1)
            groups.copy_(groups[:, :1].clone().expand_as(groups))


def _weight_by_slice(routing: Routing, granularity: int) -> Tensor:
    """[S, G]: the sum of a token's weights for the copies of each slice."""
    weight = routing.combine_weight
    return weight.new_zeros(len(weight), granularity).scatter_add_(1, routing.expert_index % granularity, weight)


def refuse_granularity(granularity: int, options: MoEOptions, experts_by_width: Dict[int, List[int]]) -> None:
    """Raise ConfigurationError unless layers of one width H can be cut into G slices, and their experts into groups of G."""
    if granularity == 1:
        return
    flag, widths = f"--granularity {granularity}", ", ".join(map(str, sorted(experts_by_width)))
    if granularity < 1:
        raise ConfigurationError(f"{flag} must be at least 1; 1 makes every expert as wide as the dense layer")
    if len(experts_by_width) > 1:
        raise ConfigurationError(f"{flag} needs layers of one width, but those with experts have {widths}; choose one stack")
    for width, numbers in experts_by_width.items():
        if width % granularity:
            raise ConfigurationError(f"{flag} does not divide the {width} hidden units of the dense layers")
        if options.expert_ffn_embed_dim not in (None, width // granularity):
            raise ConfigurationError(
                f"--expert-ffn-embed-dim {options.expert_ffn_embed_dim} contradicts {flag}, with which it is"
                f" {width // granularity}; leave it out"
            )
        odd = next((number for number in numbers if number % granularity), None)
        if odd is not None:
            raise ConfigurationError(f"{flag} does not divide the {odd} experts of a layer; use a multiple for --num-experts")
