"""Router gradient estimators: the multiplier of an expert's output, and the gradient it sends to the router.

The gradient term that Switch drops is a sum over experts of g(a) - g(0), with a = pi_i f_i. Each difference is an ODE
step from 0 to a. An estimator approximates that step by quadrature with the one expert that ran: it evaluates the
downstream loss g at s*a for a random node s, and sends `gain` times the gradient of the multiplier to the router.

    estimator   node s                                gain   in expectation over s
    switch      1                                     1      only the term that scales the chosen expert
    euler       1                                     2      first order for the dropped term, plus switch's term
    midpoint    1/2 or 1, equally likely              2      second order, plus switch's term (SparseMixer, arXiv 2310.00811)
    heun3       1 with probability 1/4, else 1/3      1      third order (GRIN, arXiv 2409.12136)
    inf         1, or uniform on [0, 1], equally      2      exact for any smooth g, plus switch's term

With `first_order_argmax`, the node is always 1 (first order) for the arg-max expert, as in both papers.
"""

from dataclasses import dataclass, replace
from typing import Callable, Dict, List, Tuple

import torch
from torch import Tensor

HEUN_THIRD = 1 / 3  # second node of Heun's third-order method, with weight 3/4


@dataclass(frozen=True)
class Estimator:
    """One row of the table above.

    `node` maps a uniform coin in [0, 1) to s; `quadrature` lists (s, probability) for expectations without sampling.
    `keeps_scale_term`: whether the expectation includes the term that scales the chosen expert ("plus switch's term").
    """

    name: str
    gain: float
    node: Callable[[Tensor], Tensor]
    quadrature: Tuple[Tuple[float, float], ...]
    keeps_scale_term: bool = True
    first_order_argmax: bool = True

    @property
    def deterministic(self) -> bool:
        """Whether s is 1 for every coin."""
        return self.quadrature == ((1.0, 1.0),)

    def multiplier(self, probability: Tensor, coin: Tensor, is_argmax: Tensor) -> Tensor:
        """The factor on the chosen expert's output, carrying the router's gradient.

        Args: probability [...] of the chosen expert; coin [...] uniform in [0, 1); is_argmax [...] bool.
        Returns: [...], `probability * s`; its backward sends `gain` times the incoming gradient to `probability`.
        """
        if self.deterministic and self.gain == 1:
            return probability
        node = self.node(coin)
        if self.first_order_argmax:
            node = torch.where(is_argmax, torch.ones_like(coin), node)
        return self.multiplier_at(probability, node.to(probability.dtype))

    def multiplier_at(self, probability: Tensor, node: Tensor) -> Tensor:
        """The same for a given node s [...] instead of a drawn one."""
        value = probability.detach()
        return value * node + self.gain * (probability - value)  # the second term is zero and carries the gradient


def _uniform_quadrature(points: int = 8) -> List[Tuple[float, float]]:
    """Gauss-Legendre nodes and weights on [0, 1]: exact for polynomials of degree 15."""
    from numpy.polynomial.legendre import leggauss

    nodes, weights = leggauss(points)
    return [((node + 1) / 2, weight / 2) for node, weight in zip(nodes.tolist(), weights.tolist())]


# Coin -> node. Named functions, because a model must be picklable.
def _one(coin: Tensor) -> Tensor:
    return torch.ones_like(coin)


def _half_or_one(coin: Tensor) -> Tensor:
    return 0.5 + 0.5 * (coin >= 0.5).to(coin.dtype)


def _third_or_one(coin: Tensor) -> Tensor:
    return torch.where(coin < 0.25, torch.ones_like(coin), torch.full_like(coin, HEUN_THIRD))


def _uniform_or_one(coin: Tensor) -> Tensor:
    # a coin below one half, rescaled to [0, 1), is the uniform node itself
    return torch.where(coin < 0.5, 2 * coin, torch.ones_like(coin))


NODES = (_one, _half_or_one, _third_or_one, _uniform_or_one)  # a kernel knows them by number
_ALWAYS_ONE = ((1.0, 1.0),)

ESTIMATORS: Dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        Estimator("switch", 1.0, _one, _ALWAYS_ONE),
        Estimator("euler", 2.0, _one, _ALWAYS_ONE),
        Estimator("midpoint", 2.0, _half_or_one, ((1.0, 0.5), (0.5, 0.5))),
        Estimator("heun3", 1.0, _third_or_one, ((1.0, 0.25), (HEUN_THIRD, 0.75)), keeps_scale_term=False),
        Estimator(
            "inf",
            2.0,
            _uniform_or_one,
            ((1.0, 0.5),) + tuple((node, weight / 2) for node, weight in _uniform_quadrature()),
        ),
    )
}


def get_estimator(name: str, first_order_argmax: bool = True) -> Estimator:
    """The named estimator, with or without the arg-max rule. Raises ValueError, listing the names, for an unknown one."""
    if name not in ESTIMATORS:
        raise ValueError(f"gradient_estimator={name} is unknown; choose from {', '.join(ESTIMATORS)}")
    return replace(ESTIMATORS[name], first_order_argmax=first_order_argmax)
