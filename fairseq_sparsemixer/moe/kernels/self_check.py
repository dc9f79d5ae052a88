"""The kernels compared with reference.py on small inputs: once in a process on a new device, and in tests."""

from typing import Any, Iterator, List, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.kernels import ops, reference
from fairseq_sparsemixer.moe.kernels.sizes import BIAS_TILE

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-4}  # of the largest value
ACTIVATIONS = ("identity", "relu", "gelu", "swiglu")
Example = Tuple[str, Tuple[Any, ...]]  # an op, and its arguments


def disagreement(device: torch.device, dtype: torch.dtype) -> str:
    """The first op whose kernel and formula differ on this device for rows of this dtype; empty if all agree."""
    with torch.no_grad():
        for name, arguments in examples(device, dtype):
            if not agrees(name, arguments):
                return f"{name} differs from its formula"
    return ""


def agrees(name: str, arguments: Tuple[Any, ...]) -> bool:
    """Whether the op gives what its formula gives, also in the tensors that it changes."""
    ours, theirs = ([value.clone() if torch.is_tensor(value) else value for value in arguments] for _ in range(2))
    found, expected = getattr(ops, name)(*ours), getattr(reference, name)(*theirs)
    if found is None:
        found, expected = ours[0], theirs[0]
    pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
    return all(_close(one, other) for one, other in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    difference, largest = (one.float() - other.float()).abs().max(), other.float().abs().max()
    return bool(difference <= TOLERANCE[other.dtype] * largest.clamp(min=1e-3))


def examples(device: torch.device, dtype: torch.dtype, width: int = 64, hidden: int = 96) -> Iterator[Example]:
    """Every op with arguments, on 4 experts of which one is idle, with padding and rows behind the last expert."""
    tokens, k, experts = 80, 2, 4

    def waves(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return _waves(*shape).to(device, of)

    index = torch.arange(tokens, device=device)
    expert_index = torch.stack([index % 2, (index // 7) % 2 + 2 * (index % 3 > 0)], 1)
    expert_index.masked_fill_(expert_index == 2, 3)
    unrouted = (index % 5 == 0).unsqueeze(1).expand(-1, k).contiguous()
    yield "count_pairs", (expert_index, unrouted, experts)
    counts = reference.count_pairs(expert_index, unrouted, experts)
    yield "place_pairs", (expert_index, unrouted, counts)
    pairs, place, ends = reference.place_pairs(expert_index, unrouted, counts)
    x, rows, count = waves(tokens, width), waves(tokens * k, width), tokens * k
    weight, bias, scale = waves(tokens, k, of=torch.float32), waves(experts, width), waves(width)
    yield "gather_rows", (x, pairs, ends, k, dtype)
    yield "combine_rows", (rows, place, ends, k, weight, bias, expert_index, scale, dtype)
    yield "combine_rows", (rows, place, ends, k, None, None, None, None, dtype)
    yield "combine_backward", (x, rows, pairs, ends, k, weight, bias, scale)
    keep = _waves(count, hidden).to(device) > -0.5
    for activation in ACTIVATIONS:
        product, shift = (waves(size, hidden * (1 + (activation in reference.GATED))) for size in (count, experts))
        for mask, factor in ((None, 1.0), (keep, 1.5)):
            yield "bias_activation", (product, shift, ends, activation, mask, factor)
            kept = reference.bias_activation(product, shift, ends, activation, mask, factor) if activation == "relu" else product
            if activation != "identity":
                upstream = waves(count, hidden)
                yield "bias_activation_backward", (upstream, kept, shift, ends, activation, mask, factor)
    yield "tile_sums", (rows, ends)
    yield "sum_tiles", (reference.tile_sums(rows, ends), ends, count, BIAS_TILE, dtype)
    yield "sum_parts", (waves(3, experts, width, of=torch.float32), dtype)
    matrices = waves(experts, width, hidden)
    yield "clear_tail", (rows, ends)
    yield "clear_idle", (matrices, ends)
    yield "grouped_product", (rows, matrices, ends)
    yield "grouped_product", (waves(count, hidden), matrices.transpose(1, 2), ends)
    yield "grouped_weight_gradient", (rows, waves(count, hidden), ends)
    projection, grad = waves(experts, width, of=torch.float32), waves(tokens, experts, of=torch.float32)
    yield "project", (x, projection)
    yield "project_backward_tokens", (grad, projection, x, dtype)
    yield "project_backward_weight", (grad, x)
    yield from _routing_examples(waves(tokens, experts, of=torch.float32) * 2, unrouted[:, 0].contiguous())


def _routing_examples(logits: Tensor, padding: Tensor) -> Iterator[Example]:
    tokens, experts = logits.shape
    bias = _waves(experts).to(logits.device)
    for router, k in (("switch", 1), ("sparsemixer", 1), ("sparsemixer_v2", 2)):
        shape = (tokens, experts) if router == "switch" else (tokens, k, experts + 1)
        for noise in (None, _waves(*shape).to(logits.device) * 0.45 + 0.5):
            options: List[Any] = [router, k, 0.2, 1, False, True]
            yield "route", (logits, noise, bias, padding, *options)
            index, weight, _, sums = reference.route(logits, noise, bias, padding, *options)
            yield "route_losses", (sums, k)
            balance, router_z, slopes = reference.route_losses(sums, k)
            yield "route_backward", (weight, balance, router_z, logits, noise, padding, index, slopes, router, 0.2, 2.0)


def _waves(*shape: int) -> Tensor:
    """Numbers in [-1, 1], without torch's random state: a check must not change a training."""
    size = torch.Size(shape).numel()
    return torch.arange(size, dtype=torch.float64, device="cpu").mul_(1.7).add_(size).sin_().view(shape).float()
