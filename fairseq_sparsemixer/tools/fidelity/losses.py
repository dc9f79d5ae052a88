"""Synthetic problems: random tokens, router and experts in float64, with a downstream loss of known shape."""

from typing import Callable, Dict, Optional

import torch
from torch import Generator, Tensor

from fairseq_sparsemixer.tools.fidelity.problem import Problem

VOCABULARY = 32  # classes of the cross-entropy head
STEP = 2.0  # scale of the experts' outputs: large enough for the curvature of the loss to matter


def _random(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quadratic(tokens: int, model_dim: int, generator: Generator) -> Callable[[Tensor], Tensor]:
    """g(y) = (y - t)^T A (y - t) / 2 with a target t per token and A positive semi-definite."""
    root = _random(generator, model_dim, model_dim) / model_dim**0.5
    target = _random(generator, tokens, model_dim)
    return lambda y: ((y - target) @ root).square().sum(-1) / 2


def cubic(tokens: int, model_dim: int, generator: Generator) -> Callable[[Tensor], Tensor]:
    """The quadratic plus (c y)^3 / 6."""
    bowl = quadratic(tokens, model_dim, generator)
    direction = _random(generator, model_dim) / model_dim**0.5
    return lambda y: bowl(y) + (y @ direction) ** 3 / 6


def cross_entropy(tokens: int, model_dim: int, generator: Generator) -> Callable[[Tensor], Tensor]:
    """-log softmax(W (r + y))[label], where r is the residual stream to which a transformer layer adds its output."""
    head = _random(generator, model_dim, VOCABULARY) / model_dim**0.5
    residual = _random(generator, tokens, model_dim)
    label = torch.randint(VOCABULARY, (tokens,), generator=generator)

    def loss(y: Tensor) -> Tensor:
        logits = (residual + y) @ head  # [..., S, V]
        return -logits.log_softmax(-1).gather(-1, label.expand(y.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    return loss


LOSSES: Dict[str, Callable[[int, int, Generator], Callable[[Tensor], Tensor]]] = {
    "cross-entropy": cross_entropy,
    "quadratic": quadratic,
    "cubic": cubic,
}


def synthetic_problem(
    loss: str,
    tokens: int = 16,
    num_experts: int = 8,
    model_dim: int = 16,
    jitter_eps: Optional[float] = None,
    step: float = STEP,
    seed: int = 1,
) -> Problem:
    """S = tokens random tokens, logits of unit variance, and random linear experts of scale `step`.

    Raises ValueError, listing the known losses, for an unknown loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"--loss {loss} is unknown; choose from {', '.join(LOSSES)}")
    generator = Generator().manual_seed(seed)
    x = _random(generator, tokens, model_dim)
    router = _random(generator, model_dim, num_experts) / model_dim**0.5
    experts = step * _random(generator, num_experts, model_dim, model_dim) / model_dim**0.5
    return Problem(
        tokens=x,
        logits=x @ router,
        outputs=torch.einsum("si,eim->sem", x, experts),
        loss=LOSSES[loss](tokens, model_dim, generator),
        jitter_eps=jitter_eps,
        description=f"{loss} loss, {tokens} random tokens of width {model_dim}, {num_experts} linear experts of scale {step:g}",
    )
