"""The router in one pass over the logits: masks, softmax, Gumbel noise, arg-max, multiplier, and sums for the auxiliary losses.

k draws one after another; see ops.route for what each of the routers computes.
"""

from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fairseq_sparsemixer.moe.kernels.sizes import ROUTE_TOKENS, num_route_blocks

MOST = 2048  # logits at once


def step_of(width: int) -> int:
    """Tokens to route at once."""
    return max(min(32, MOST // width), 1)


@triton.jit
def mask_unlikely(logits, eps2):
    """As gates.sparsemixer.mask_unlikely, whose comparison is false for 0 / 0 as well. The largest logit stays."""
    top = tl.max(logits, 1)[:, None]
    return tl.where((top - logits) / tl.maximum(tl.abs(logits), top) > eps2, float("-inf"), logits)


@triton.jit
def softmax(logits):
    """Over the experts. A NaN makes all of a token's probabilities NaN."""
    exponential = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exponential / tl.sum(exponential, 1)[:, None]


@triton.jit
def log_sum_exp(logits):
    """Over the experts."""
    top = tl.max(logits, 1)
    return top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))


@triton.jit
def node_of(coin, NODE: tl.constexpr):
    """The estimator's node for a coin in [0, 1), as in estimators.py."""
    if NODE == 0:
        node = tl.where(coin == coin, 1.0, 1.0)
    elif NODE == 1:
        node = tl.where(coin >= 0.5, 1.0, 0.5)
    elif NODE == 2:
        node = tl.where(coin < 0.25, 1.0, 1.0 / 3.0)
    else:
        node = tl.where(coin < 0.5, 2 * coin, 1.0)
    return node


@triton.jit
def _kernel(logits, noise, bias, padding, index, weight, probabilities, sums, S, E, eps2, MASKS: tl.constexpr,
            JITTERS: tl.constexpr, SAMPLES: tl.constexpr, COINS: tl.constexpr, NODE: tl.constexpr,
            NODE_AT_ARGMAX: tl.constexpr, MASKED_SUMS: tl.constexpr, K: tl.constexpr, HAS_BIAS: tl.constexpr,
            HAS_PADDING: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    expert = tl.arange(0, WIDTH)
    valid = (expert < E)[None, :]
    probability_sum = tl.zeros([WIDTH], tl.float32)
    chosen_sum = tl.zeros([WIDTH], tl.float32)
    square_sum = 0.0
    real_sum = 0.0
    shift = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    for first in range(0, TOKENS, STEP):
        token = tl.program_id(0) * TOKENS + first + tl.arange(0, STEP)
        there = token < S
        real = there
        if HAS_PADDING:
            real = there & (tl.load(padding + token, mask=there, other=1) == 0)
        at = token[:, None].to(tl.int64) * E + expert[None, :]
        inside = there[:, None] & valid
        scores = tl.where(valid, tl.load(logits + at, mask=inside, other=0.0), float("-inf"))
        if JITTERS:
            scores = tl.where(valid, scores * tl.load(noise + at, mask=inside, other=1.0), scores)
        remaining = scores
        for choice in range(K):
            masked = remaining
            if MASKS:
                masked = mask_unlikely(remaining, eps2)
            probability = softmax(masked)
            selection = masked
            if HAS_BIAS:
                selection += shift[None, :]
            noise_at = noise + (token.to(tl.int64) * K + choice) * (E + 1)  # E numbers for the experts, one coin
            if SAMPLES:
                uniform = tl.load(noise_at[:, None] + expert[None, :], mask=inside, other=0.5)
                selection -= tl.log(-tl.log(uniform))
            selection = tl.where(valid, selection, float("-inf"))
            best = tl.minimum(tl.argmax(selection, 1).to(tl.int32), E - 1)
            drawn = expert[None, :] == best[:, None]
            chosen = tl.sum(tl.where(drawn, probability, 0.0), 1)
            if COINS:
                coin = tl.load(noise_at + E, mask=there, other=0.0)
                node = node_of(coin, NODE)
                if not NODE_AT_ARGMAX:
                    node = tl.where(best == tl.argmax(remaining, 1).to(tl.int32), 1.0, node)
                chosen *= node
            tl.store(index + token.to(tl.int64) * K + choice, best.to(tl.int64), mask=there)
            tl.store(weight + token.to(tl.int64) * K + choice, tl.where(real, chosen, 0.0), mask=there)
            chosen_sum += tl.sum(tl.where(drawn & real[:, None], 1.0, 0.0), 0)
            remaining = tl.where(drawn, float("-inf"), remaining)
        weighed = scores
        if MASKED_SUMS:
            weighed = mask_unlikely(scores, eps2)
        probability = softmax(weighed)
        tl.store(probabilities + at, probability, mask=inside)
        probability_sum += tl.sum(tl.where(real[:, None] & valid, probability, 0.0), 0)
        norm = log_sum_exp(scores)
        square_sum += tl.sum(tl.where(real, norm * norm, 0.0), 0)
        real_sum += tl.sum(tl.where(real, 1.0, 0.0), 0)
    own = sums + tl.program_id(0) * (2 * E + 2)
    tl.store(own + expert, probability_sum, mask=expert < E)
    tl.store(own + E + expert, chosen_sum, mask=expert < E)
    tl.store(own + 2 * E, square_sum)
    tl.store(own + 2 * E + 1, real_sum)


def run(
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
    tokens, experts = logits.shape
    blocks, width = num_route_blocks(tokens), triton.next_power_of_2(experts)
    index = logits.new_empty(tokens, k, dtype=torch.int64)
    weight, probabilities = logits.new_empty(tokens, k), torch.empty_like(logits)
    sums = logits.new_empty(blocks, 2 * experts + 2)
    mixes, noisy = router != "switch", noise is not None
    given = [logits if tensor is None else tensor for tensor in (noise, bias, padding_mask)]
    _kernel[(blocks,)](
        logits, *given, index, weight, probabilities, sums, tokens, experts, 2 * jitter_eps, mixes, noisy and not mixes,
        noisy and mixes and sampled, noisy and mixes and node >= 0, max(node, 0), node_at_argmax, router == "sparsemixer", k,
        bias is not None, padding_mask is not None, ROUTE_TOKENS, step_of(width), width,
    )  # fmt: skip
    return index, weight, probabilities, sums
