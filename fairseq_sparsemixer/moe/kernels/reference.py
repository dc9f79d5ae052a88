"""What the kernels compute, in PyTorch: what they are tested against, and what their custom ops run on a CPU."""

from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_sparsemixer.moe.estimators import NODES
from fairseq_sparsemixer.moe.kernels.sizes import (
    BIAS_TILE,
    BLOCK,
    COMBINE_TILE,
    ROUTE_TOKENS,
    num_blocks,
    num_parts,
    num_route_blocks,
    num_tiles,
)

CURVES: Dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "geglu": F.gelu, "swiglu": F.silu,
}  # fmt: skip
SLOPES: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (gradient, x) -> gradient times the curve's derivative at x
    "identity": lambda grad, x: grad,
    "gelu": torch.ops.aten.gelu_backward,
    "silu": torch.ops.aten.silu_backward,
    "geglu": torch.ops.aten.gelu_backward,
    "swiglu": torch.ops.aten.silu_backward,
}
GATED = ("geglu", "swiglu")


def float_of(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def expert_of_rows(ends: Tensor, rows: int) -> Tensor:
    """[N]: the expert of each row, E behind the last."""
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


def tile_of_rows(ends: Tensor, rows: int, tile: int) -> Tensor:
    """[N]: the tile of each row."""
    start = torch.cat([ends.new_zeros(1), ends])  # [E + 1], that of the rows behind as well
    stop = torch.cat([ends, ends.new_full((1,), rows)])
    tiles = (stop - start + tile - 1).div(tile, rounding_mode="floor")
    first = tiles.cumsum(0) - tiles
    expert = expert_of_rows(ends, rows)
    place = torch.arange(rows, device=ends.device) - start[expert]
    return first[expert] + place.div(tile, rounding_mode="floor")


def _sums_of_tiles(values: Tensor, ends: Tensor, tile: int) -> Tensor:
    """values [N, C], zero behind the last expert -> [T, C]."""
    rows = values.size(0)
    sums = values.new_zeros(num_tiles(rows, ends.size(0), tile), values.size(1))
    return sums.index_add_(0, tile_of_rows(ends, rows, tile), values).float()


def _of_experts(stacked: Tensor, ends: Tensor, rows: int) -> Tuple[Tensor, Tensor]:
    """stacked [E, C] -> [N, C], the line of each row's expert; [N, 1] bool, whether it has one."""
    expert = expert_of_rows(ends, rows)
    return float_of(stacked)[expert.clamp(max=ends.size(0) - 1)], (expert < ends.size(0)).unsqueeze(1)


def count_pairs(expert_index: Tensor, unrouted: Optional[Tensor], num_experts: int) -> Tensor:
    """See ops.count_pairs."""
    expert = _experts(expert_index, unrouted, num_experts)
    blocks = num_blocks(expert.numel())
    counts = torch.zeros(blocks * (num_experts + 1), dtype=torch.int32, device=expert.device)
    block = torch.arange(expert.numel(), device=expert.device).div(BLOCK, rounding_mode="floor")
    counts.scatter_add_(0, block * (num_experts + 1) + expert, torch.ones_like(expert, dtype=torch.int32))
    return counts.view(blocks, num_experts + 1)


def place_pairs(expert_index: Tensor, unrouted: Optional[Tensor], counts: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.place_pairs."""
    experts = counts.size(1) - 1
    pairs = _experts(expert_index, unrouted, experts).argsort(stable=True)
    place = torch.empty_like(pairs, dtype=torch.int32)
    place[pairs] = torch.arange(len(pairs), dtype=torch.int32, device=pairs.device)
    return pairs, place, counts.sum(0).cumsum(0)[:experts].to(torch.int32)


def _experts(expert_index: Tensor, unrouted: Optional[Tensor], num_experts: int) -> Tensor:
    expert = expert_index.reshape(-1)
    return expert if unrouted is None else expert.masked_fill(unrouted.reshape(-1), num_experts)


def gather_rows(tokens: Tensor, pairs: Tensor, ends: Optional[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """See ops.gather_rows."""
    rows = tokens[pairs.div(k, rounding_mode="floor")].to(dtype)
    if ends is None:
        return rows
    return rows.masked_fill_(torch.arange(len(pairs), device=pairs.device).unsqueeze(1) >= ends[-1:], 0)


def combine_rows(
    rows: Tensor,
    place: Tensor,
    ends: Optional[Tensor],
    k: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    expert_index: Optional[Tensor],
    scale: Optional[Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """See ops.combine_rows."""
    live = (place >= 0) & (place < rows.size(0))
    if ends is not None:
        live &= place < ends[-1]
    if not rows.size(0):
        rows = rows.new_zeros(1, rows.size(1))
    value = float_of(rows)[place.clamp(0, rows.size(0) - 1).long()]  # [P, M]
    if bias is not None and expert_index is not None:
        value = value + float_of(bias)[expert_index.reshape(-1)]
    if weight is not None:
        value = value * float_of(weight).reshape(-1, 1)
    value = value if scale is None else value * float_of(scale)
    return torch.where(live.unsqueeze(1), value, value.new_zeros(())).view(-1, k, rows.size(1)).sum(1).to(dtype)


def combine_backward(
    grad: Tensor,
    rows: Tensor,
    pairs: Tensor,
    ends: Tensor,
    k: int,
    weight: Tensor,
    bias: Optional[Tensor],
    scale: Optional[Tensor],
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.combine_backward."""
    total, width, count = pairs.size(0), rows.size(1), rows.size(0)
    value = float_of(rows.new_zeros(total, width))
    value[:count] = float_of(rows)
    live = torch.arange(total, device=pairs.device).unsqueeze(1) < torch.minimum(ends[-1:], ends.new_full((1,), count))
    if bias is not None:
        value = value + _of_experts(bias, ends, total)[0]
    value = torch.where(live, value, value.new_zeros(()))
    upstream = torch.where(live, float_of(grad)[pairs.div(k, rounding_mode="floor")], value.new_zeros(()))
    factor = torch.where(live, float_of(weight).reshape(-1)[pairs].unsqueeze(1), value.new_zeros(()))
    scaled = upstream if scale is None else upstream * float_of(scale)
    grad_weight = torch.empty_like(value[:, 0])
    grad_weight[pairs] = (scaled * value).sum(1)
    grad_rows, nothing = scaled * factor, value.new_empty(0, width, dtype=torch.float32)
    return (
        grad_rows[:count].to(rows.dtype),
        grad_weight.float(),
        nothing if bias is None else _sums_of_tiles(grad_rows, ends, COMBINE_TILE),
        nothing.clone() if scale is None else _sums_of_tiles(upstream * value * factor, ends, COMBINE_TILE),
    )


def _activate(value: Tensor, activation: str) -> Tensor:
    if activation not in GATED:
        return CURVES[activation](value)
    gate, linear = value.chunk(2, dim=-1)
    return CURVES[activation](gate) * linear


def bias_activation(
    product: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float
) -> Tensor:
    """See ops.bias_activation."""
    shift, live = _of_experts(bias, ends, product.size(0))
    hidden = _activate(float_of(product) + shift, activation)
    if keep is not None:
        hidden = torch.where(keep, hidden * factor, hidden.new_zeros(()))
    return torch.where(live, hidden, hidden.new_zeros(())).to(product.dtype)


def bias_activation_backward(
    grad: Tensor, kept: Tensor, bias: Tensor, ends: Tensor, activation: str, keep: Optional[Tensor], factor: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.bias_activation_backward."""
    shift, live = _of_experts(bias, ends, kept.size(0))
    upstream = float_of(grad)
    if activation == "relu":
        hidden = grad.new_empty(0, grad.size(1))
        inner = torch.where(kept <= 0, upstream.new_zeros(()), upstream * factor)
    else:
        if keep is not None:
            upstream = torch.where(keep, upstream * factor, upstream.new_zeros(()))
        value = float_of(kept) + shift
        result = _activate(value, activation)
        if activation in GATED:
            gate, linear = value.chunk(2, dim=-1)
            inner = torch.cat([SLOPES[activation](upstream * linear, gate), upstream * CURVES[activation](gate)], 1)
        else:
            inner = SLOPES[activation](upstream, value)
        if keep is not None:
            result = torch.where(keep, result * factor, result.new_zeros(()))
        hidden = torch.where(live, result, result.new_zeros(())).to(grad.dtype)
    inner = torch.where(live, inner, inner.new_zeros(()))
    return inner.to(kept.dtype), hidden, _sums_of_tiles(inner, ends, BIAS_TILE)


def tile_sums(rows: Tensor, ends: Tensor) -> Tensor:
    """See ops.tile_sums."""
    live = (expert_of_rows(ends, rows.size(0)) < ends.size(0)).unsqueeze(1)
    return _sums_of_tiles(torch.where(live, float_of(rows), float_of(rows).new_zeros(())), ends, BIAS_TILE)


def sum_tiles(sums: Tensor, ends: Tensor, rows: int, tile: int, dtype: torch.dtype) -> Tensor:
    """See ops.sum_tiles."""
    first = torch.cat([ends.new_zeros(1), ends])[:-1]
    last = ((ends - first + tile - 1).div(tile, rounding_mode="floor")).cumsum(0)  # [E], the tile after each expert's last
    expert = torch.searchsorted(last, torch.arange(sums.size(0), device=ends.device), right=True)
    out = sums.new_zeros(ends.size(0) + 1, sums.size(1)).index_add_(0, expert, sums)
    return out[:-1].to(dtype)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """See ops.sum_parts."""
    return parts.sum(0).to(dtype)


def clear_tail(rows: Tensor, ends: Tensor) -> None:
    """See ops.clear_tail."""
    rows.masked_fill_((expert_of_rows(ends, rows.size(0)) == ends.size(0)).unsqueeze(1), 0)


def clear_idle(stacked: Tensor, ends: Tensor) -> None:
    """See ops.clear_idle."""
    stacked.masked_fill_((ends == torch.cat([ends.new_zeros(1), ends])[:-1]).view(-1, 1, 1), 0)


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """See ops.grouped_product."""
    out = rows.new_zeros(rows.size(0), matrices.size(2))
    for expert, own in enumerate(_slices(ends)):
        out[own] = (float_of(rows[own]) @ float_of(matrices[expert])).to(rows.dtype)
    return out


def grouped_weight_gradient(inputs: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """See ops.grouped_weight_gradient."""
    return torch.stack([(float_of(inputs[own]).t() @ float_of(grad[own])).to(inputs.dtype) for own in _slices(ends)])


def _slices(ends: Tensor) -> List[slice]:
    stops = ends.tolist()
    return [slice(start, stop) for start, stop in zip([0, *stops], stops)]


def project(tokens: Tensor, weight: Tensor) -> Tensor:
    """See ops.project."""
    return F.linear(tokens.float(), weight.float())


def project_backward_tokens(grad: Tensor, weight: Tensor, others: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """See ops.project_backward_tokens."""
    product = grad @ weight.to(grad.dtype)
    return (product if others is None else product + others).to(dtype)


def project_backward_weight(grad: Tensor, tokens: Tensor) -> Tensor:
    """See ops.project_backward_weight."""
    parts = num_parts(grad.size(0), grad.size(1), tokens.size(1))
    each = max(-(-grad.size(0) // parts), 1)
    slices = [slice(first, first + each) for first in range(0, parts * each, each)]
    return torch.stack([grad[own].t() @ tokens[own].to(grad.dtype) for own in slices])


def _masked(logits: Tensor, jitter_eps: float) -> Tensor:
    top = logits.amax(-1, keepdim=True)
    return logits.masked_fill((top - logits) / torch.maximum(logits.abs(), top) > 2 * jitter_eps, float("-inf"))


def _scores(logits: Tensor, noise: Optional[Tensor], router: str) -> Tensor:
    return logits * noise if router == "switch" and noise is not None else logits


def route(
    logits: Tensor,
    noise: Optional[Tensor],
    bias: Optional[Tensor],
    padding_mask: Optional[Tensor],
    router: str,
    k: int,
    jitter_eps: float,
    node: int,
    node_at_argmax: bool,
    sampled: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.route."""
    remaining = scores = _scores(logits, noise, router)
    index, weights = [], []
    probabilities = scores.softmax(-1)
    draws = None if noise is None or router == "switch" else noise
    for choice in range(k):
        masked = remaining if router == "switch" else _masked(remaining, jitter_eps)
        if router == "sparsemixer":
            probabilities = masked.softmax(-1)
        selection = masked if bias is None else masked + bias
        if draws is not None and sampled:
            selection = selection - (-draws[:, choice, :-1].log()).log()
        drawn = selection.argmax(-1, keepdim=True)
        weight = masked.softmax(-1).gather(1, drawn)
        if draws is not None and node >= 0:
            at = NODES[node](draws[:, choice, -1:])
            weight = weight * (at if node_at_argmax else torch.where(drawn == remaining.argmax(-1, keepdim=True), 1.0, at))
        index.append(drawn)
        weights.append(weight)
        remaining = remaining.scatter(1, drawn, float("-inf"))
    real = logits.new_ones(len(logits), 1) if padding_mask is None else (~padding_mask).to(logits.dtype).unsqueeze(1)
    chosen = torch.zeros_like(logits).scatter_(1, torch.cat(index, 1), 1.0)
    sums = torch.cat([probabilities, chosen, scores.logsumexp(-1, keepdim=True).square(), torch.ones_like(real)], 1)
    sums = torch.where(real > 0, sums, sums.new_zeros(()))
    blocks = num_route_blocks(len(logits))
    sums = F.pad(sums, (0, 0, 0, blocks * ROUTE_TOKENS - len(sums))).view(blocks, ROUTE_TOKENS, -1).sum(1)
    weight = torch.where(real > 0, torch.cat(weights, 1), logits.new_zeros(()))
    return torch.cat(index, 1), weight, probabilities, sums


def route_losses(sums: Tensor, k: int) -> Tuple[Tensor, Tensor, Tensor]:
    """See ops.route_losses."""
    experts = sums.size(1) // 2 - 1
    probability, chosen, square, real = sums.sum(0).split([experts, experts, 1, 1])
    count = real.clamp(min=1)
    slopes = experts * (chosen / count / k) / count
    return (slopes * probability).sum(), (square / count).view(()), torch.cat([slopes, 1 / count])


def route_backward(
    grad_weight: Optional[Tensor],
    grad_balance: Optional[Tensor],
    grad_router_z: Optional[Tensor],
    logits: Tensor,
    noise: Optional[Tensor],
    padding_mask: Optional[Tensor],
    index: Tensor,
    slopes: Tensor,
    router: str,
    jitter_eps: float,
    gain: float,
) -> Tensor:
    """See ops.route_backward."""
    remaining = scores = _scores(logits, noise, router)
    total = torch.zeros_like(logits)
    for choice in range(0 if grad_weight is None else index.size(1)):
        assert grad_weight is not None
        masked, drawn = remaining if router == "switch" else _masked(remaining, jitter_eps), index[:, choice : choice + 1]
        total += _softmax_backward(torch.zeros_like(total).scatter_(1, drawn, gain * grad_weight[:, choice : choice + 1]), masked)
        remaining = remaining.scatter(1, drawn, float("-inf"))
    if grad_balance is not None:
        of_balance = (grad_balance * slopes[:-1]).expand_as(logits)
        total += _softmax_backward(of_balance, _masked(scores, jitter_eps) if router == "sparsemixer" else scores)
    if grad_router_z is not None:
        total += 2 * grad_router_z * slopes[-1] * scores.logsumexp(-1, keepdim=True) * scores.softmax(-1)
    if padding_mask is not None:
        total = total.masked_fill(padding_mask.unsqueeze(1), 0)
    return total * noise if router == "switch" and noise is not None else total


def _softmax_backward(grad: Tensor, logits: Tensor) -> Tensor:
    """The gradient of the logits [S, E], from that of their softmax."""
    probabilities = logits.softmax(-1)
    return probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True))
