"""The gradient of the logits in one pass, from those of the combine weights and of the auxiliary losses."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.route import log_sum_exp, mask_unlikely, softmax, step_of


@triton.jit
def _kernel(grad_weight, grad_balance, grad_router_z, logits, noise, padding, index, slopes, out, S, E, eps2, gain,
            MASKS: tl.constexpr, JITTERS: tl.constexpr, MASKED_SUMS: tl.constexpr, K: tl.constexpr, HAS_WEIGHT: tl.constexpr,
            HAS_BALANCE: tl.constexpr, HAS_ROUTER_Z: tl.constexpr, HAS_PADDING: tl.constexpr, STEP: tl.constexpr,
            WIDTH: tl.constexpr):  # fmt: skip
    expert = tl.arange(0, WIDTH)
    valid = (expert < E)[None, :]
    token = tl.program_id(0) * STEP + tl.arange(0, STEP)
    there = token < S
    real = there
    if HAS_PADDING:
        real = there & (tl.load(padding + token, mask=there, other=1) == 0)
    at = token[:, None].to(tl.int64) * E + expert[None, :]
    inside = there[:, None] & valid
    scores = tl.where(valid, tl.load(logits + at, mask=inside, other=0.0), float("-inf"))
    if JITTERS:
        jitter = tl.load(noise + at, mask=inside, other=1.0)
        scores = tl.where(valid, scores * jitter, scores)
    total = tl.zeros([STEP, WIDTH], tl.float32)
    remaining = scores
    for choice in range(K if HAS_WEIGHT else 0):
        masked = remaining
        if MASKS:
            masked = mask_unlikely(remaining, eps2)
        probability = softmax(masked)
        drawn = expert[None, :] == tl.load(index + token.to(tl.int64) * K + choice, mask=there, other=0)[:, None]
        upstream = tl.load(grad_weight + token.to(tl.int64) * K + choice, mask=real, other=0.0) * gain
        chosen = tl.sum(tl.where(drawn, probability, 0.0), 1)
        total += (upstream * chosen)[:, None] * (tl.where(drawn, 1.0, 0.0) - probability)
        remaining = tl.where(drawn, float("-inf"), remaining)
    if HAS_BALANCE:
        of_balance = tl.load(grad_balance) * tl.load(slopes + expert, mask=expert < E, other=0.0)[None, :]
        weighed = scores
        if MASKED_SUMS:
            weighed = mask_unlikely(scores, eps2)
        probability = softmax(weighed)
        mean = tl.sum(tl.where(valid, probability * of_balance, 0.0), 1)
        total += tl.where(real[:, None], probability * (of_balance - mean[:, None]), 0.0)
    if HAS_ROUTER_Z:
        of_square = tl.load(grad_router_z) * tl.load(slopes + E)
        total += tl.where(real[:, None], (2 * of_square * log_sum_exp(scores))[:, None] * softmax(scores), 0.0)
    if JITTERS:
        total *= jitter
    tl.store(out + at, total, mask=inside)


def run(
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
    tokens, experts = logits.shape
    out, width = torch.empty_like(logits), triton.next_power_of_2(experts)
    mixes, step = router != "switch", step_of(triton.next_power_of_2(experts))
    upstream = [logits if tensor is None else tensor for tensor in (grad_weight, grad_balance, grad_router_z)]
    has = [tensor is not None for tensor in (grad_weight, grad_balance, grad_router_z, padding_mask)]
    given = [logits if tensor is None else tensor for tensor in (noise, padding_mask)]
    if tokens:
        _kernel[(triton.cdiv(tokens, step),)](
            *upstream, logits, *given, index, slopes, out, tokens, experts, 2 * jitter_eps, gain, mixes,
            noise is not None and not mixes, router == "sparsemixer", index.size(1), *has, step, width,
        )  # fmt: skip
    return out
