"""Order of convergence: how fast an estimator's error in the choice term falls as the ODE step a = pi_i f_i shrinks."""

from dataclasses import dataclass
from typing import List, Optional, Sequence

import numpy as np

from fairseq_sparsemixer.tools.fidelity.exact import exact_gradient
from fairseq_sparsemixer.tools.fidelity.measure import EXACT, enumerated_moments
from fairseq_sparsemixer.tools.fidelity.methods import CHOICE, Method, SampledExpert
from fairseq_sparsemixer.tools.fidelity.problem import Problem

STEPS = tuple(2.0**-k for k in range(2, 8))
FITTED = 4  # fit the smallest steps, where the leading term dominates the error


@dataclass(frozen=True)
class OrderStudy:
    """errors: one per step, relative to the choice term at step 1. order: the fitted slope; None if only rounding errors."""

    method: Method
    steps: Sequence[float]
    errors: Sequence[float]
    order: Optional[float]


def order_of_convergence(problem: Problem, methods: List[Method], steps: Sequence[float] = STEPS) -> List[OrderStudy]:
    """The errors of every method that is an estimator, by exact expectations.

    The estimate of the choice term is the expectation, minus the scale term if the estimator includes it. Switch's
    estimate is zero.
    """
    studied = [method for method in methods if isinstance(method, SampledExpert)]
    unit = exact_gradient(problem).choice.norm().item()
    errors: List[List[float]] = [[] for _ in studied]
    for step in steps:
        scaled = problem.scaled(step)
        exact = exact_gradient(scaled)
        for method, found in zip(studied, errors):
            target = exact.choice if method.aim == CHOICE else exact.full
            found.append((enumerated_moments(method, scaled).mean - target).norm().item() / unit)
    return [OrderStudy(method, steps, found, fitted_order(steps, found)) for method, found in zip(studied, errors)]


def fitted_order(steps: Sequence[float], errors: Sequence[float]) -> Optional[float]:
    """The least-squares slope of log error over log step at the smallest steps; None if all errors are rounding."""
    if max(error / step for step, error in zip(steps, errors)) < EXACT:
        return None
    x, y = np.log2(steps[-FITTED:]), np.log2(np.maximum(errors[-FITTED:], 1e-300))
    return float(np.polyfit(x, y, 1)[0])
