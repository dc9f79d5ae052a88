"""Mean and variance of a method's gradients, by enumeration or over draws, and the figures derived from them."""

from dataclasses import dataclass, field
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.tools.fidelity.exact import ExactGradient
from fairseq_sparsemixer.tools.fidelity.methods import Deterministic, Method
from fairseq_sparsemixer.tools.fidelity.problem import Problem

CHUNK = 1024  # draws per batch
EXACT = 1e-9  # relative: rounding of float64 sums, far below any quadrature's error


@dataclass
class Moments:
    """mean: [S, E]. covariance: [S, E, E], of one draw, per token (tokens are drawn independently).

    draws: number of draws in the mean; None if enumerated. history: (draws, mean) at each doubling of the draws.
    """

    mean: Tensor
    covariance: Tensor
    draws: Optional[int] = None
    history: List[Tuple[int, Tensor]] = field(default_factory=list)


def enumerated_moments(method: Method, problem: Problem) -> Moments:
    """Exact mean and covariance over experts and nodes, without sampling noise.

    The uniform node of `inf` is integrated by its quadrature, which is exact for smooth losses. On a loss with kinks (ReLU
    experts downstream) a small error remains, which is the integration's and not the estimator's.
    """
    gradient, probability = method.outcomes(problem)
    mean = torch.einsum("os,ose->se", probability, gradient)
    centred = gradient - mean
    return Moments(mean, torch.einsum("os,ose,osf->sef", probability, centred, centred))


def sampled_moments(method: Method, problem: Problem, draws: int, seed: int) -> Moments:
    """Mean and covariance over `draws` draws per token. The same seed gives all methods the same noise."""
    total, product, done = torch.zeros_like(problem.logits), problem.logits.new_zeros(()), 0
    history: List[Tuple[int, Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        while done < draws:
            # stop at each power of two, where the history has its entries
            count = min(CHUNK, draws - done, _next_power(done) - done)
            gradient = method.sample(problem, count)
            total = total + gradient.sum(0)
            product = product + torch.einsum("nse,nsf->sef", gradient, gradient)
            done += count
            if done == draws or done == _next_power(done - 1):
                history.append((done, total / done))
    mean = total / draws
    covariance = product / draws - torch.einsum("se,sf->sef", mean, mean)
    return Moments(mean, covariance * draws / max(draws - 1, 1), draws, history)


def _next_power(done: int) -> int:
    """The smallest power of two above `done`, at least 64."""
    return max(64, 1 << done.bit_length())


@dataclass(frozen=True)
class Fidelity:
    """The figures of one method. Norms are over all tokens and logits; biases and noise are relative to a target's norm.

    bias_aim, bias_full: |mean - target| / |target| against the term it aims at, and against the full gradient.
    noise_aim, noise_full: the expected |mean - target| / |target| of an unbiased method, from sampling noise alone.
    z: standard deviations by which |mean - aim|^2 exceeds the expectation of an unbiased method; None if enumerated.
    cosine: between mean and full gradient. variance: of one draw, relative to the full gradient's squared norm.
    projection_bias, projection_variance: bias_full and variance for the gradient of the router's projection [E, M].
    """

    method: Method
    draws: Optional[int]
    bias_aim: float
    bias_full: float
    noise_aim: float
    noise_full: float
    z: Optional[float]
    cosine: float
    variance: float
    projection_bias: float
    projection_variance: float

    @property
    def unbiased(self) -> bool:
        """Whether bias_aim is within rounding (if enumerated) or within 4 sigma of sampling noise."""
        return self.bias_aim < EXACT if self.z is None else self.z < 4


def fidelity(method: Method, moments: Moments, exact: ExactGradient, problem: Problem) -> Fidelity:
    """Compare the moments with the exact gradient."""
    aim, full = getattr(exact, method.aim), exact.full
    variance = moments.covariance.diagonal(dim1=1, dim2=2).clamp(min=0)  # [S, E]
    noise = 0.0 if moments.draws is None else (variance.sum().item() / moments.draws) ** 0.5
    projection = full.t() @ problem.tokens
    token_power = problem.tokens.square().sum(1)  # [S]
    return Fidelity(
        method=method,
        draws=moments.draws,
        bias_aim=_ratio((moments.mean - aim).norm().item(), aim.norm().item()),
        bias_full=_ratio((moments.mean - full).norm().item(), full.norm().item()),
        noise_aim=_ratio(noise, aim.norm().item()),
        noise_full=_ratio(noise, full.norm().item()),
        z=None if moments.draws is None else _z(moments, moments.draws, aim),
        cosine=_ratio((moments.mean * full).sum().item(), moments.mean.norm().item() * full.norm().item()),
        variance=_ratio(variance.sum().item(), full.square().sum().item()),
        projection_bias=_ratio((moments.mean.t() @ problem.tokens - projection).norm().item(), projection.norm().item()),
        projection_variance=_ratio((variance.sum(1) * token_power).sum().item(), projection.square().sum().item()),
    )


def _z(moments: Moments, draws: int, aim: Tensor) -> float:
    """Without bias, N |mean - aim|^2 has mean tr C and variance 2 tr C^2, where C is the covariance of one draw."""
    covariance = moments.covariance
    expected = covariance.diagonal(dim1=1, dim2=2).sum().item()
    spread = (2 * covariance.square().sum().item()) ** 0.5
    excess = draws * (moments.mean - aim).square().sum().item() - expected
    return _ratio(excess, spread)


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference > 0 else 0.0


def measure(
    problem: Problem, exact: ExactGradient, methods: List[Method], draws: Optional[int] = None, seed: int = 1
) -> Tuple[List[Fidelity], List[Moments]]:
    """(figures, moments) of each method over `draws` draws; enumerated if `draws` is None or the method is deterministic."""
    moments = [
        enumerated_moments(method, problem)
        if draws is None or isinstance(method, Deterministic)
        else sampled_moments(method, problem, draws, seed)
        for method in methods
    ]
    return [fidelity(method, moment, exact, problem) for method, moment in zip(methods, moments)], moments
