"""Compares gradient estimators with the router's exact gradient, found by enumerating all experts in float64."""

from fairseq_sparsemixer.tools.fidelity.convergence import OrderStudy, order_of_convergence
from fairseq_sparsemixer.tools.fidelity.exact import ExactGradient, exact_gradient
from fairseq_sparsemixer.tools.fidelity.losses import LOSSES, synthetic_problem
from fairseq_sparsemixer.tools.fidelity.measure import Fidelity, Moments, enumerated_moments, measure, sampled_moments
from fairseq_sparsemixer.tools.fidelity.methods import METHODS, Method, select_methods
from fairseq_sparsemixer.tools.fidelity.problem import Problem

__all__ = [
    "LOSSES",
    "METHODS",
    "ExactGradient",
    "Fidelity",
    "Method",
    "Moments",
    "OrderStudy",
    "Problem",
    "enumerated_moments",
    "exact_gradient",
    "measure",
    "order_of_convergence",
    "sampled_moments",
    "select_methods",
    "synthetic_problem",
]
