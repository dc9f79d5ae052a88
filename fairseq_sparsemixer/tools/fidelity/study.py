"""A fidelity study of one problem, and its figures as a dictionary."""

from dataclasses import dataclass, replace
from typing import Any, Dict, List, Optional

import torch

import fairseq_sparsemixer
from fairseq_sparsemixer.tools.fidelity.convergence import OrderStudy, order_of_convergence
from fairseq_sparsemixer.tools.fidelity.cost import relative_times
from fairseq_sparsemixer.tools.fidelity.exact import ExactGradient, exact_gradient
from fairseq_sparsemixer.tools.fidelity.measure import Fidelity, Moments, measure
from fairseq_sparsemixer.tools.fidelity.methods import Method
from fairseq_sparsemixer.tools.fidelity.problem import Problem


@dataclass(frozen=True)
class FidelityStudy:
    """The result of `study`. figures, moments: one per method. orders: empty if not requested.

    unmasked: the exact gradient without the mask; None if there is no mask. times: relative to the switch router.
    """

    problem: Problem
    exact: ExactGradient
    figures: List[Fidelity]
    moments: List[Moments]
    orders: List[OrderStudy]
    times: Dict[str, float]
    unmasked: Optional[ExactGradient]
    draws: Optional[int]
    seed: int

    def masking(self) -> Optional[Dict[str, float]]:
        """The effect of the mask on the objective; None if there is no mask.

        experts: mean number left per token. lost_probability: mean probability of a token's masked experts.
        gradient_change: |masked - unmasked| / |unmasked| of the exact full gradients.
        """
        if self.unmasked is None:
            return None
        out = self.exact.probabilities == 0
        change = (self.exact.full - self.unmasked.full).norm() / self.unmasked.full.norm()
        return {
            "experts": (~out).double().sum(1).mean().item(),
            "lost_probability": (self.unmasked.probabilities * out).sum(1).mean().item(),
            "gradient_change": change.item(),
        }

    def as_dict(self) -> Dict[str, Any]:
        """The study for JSON. All figures except `time` depend only on the seed."""
        full = self.exact.full.norm().item()
        return {
            "fairseq_sparsemixer": fairseq_sparsemixer.__version__,
            "torch": str(torch.__version__),
            "problem": self.problem.description,
            "tokens": len(self.problem.logits),
            "num_experts": self.problem.logits.size(1),
            "jitter_eps": self.problem.jitter_eps if self.problem.masked else None,
            "draws": self.draws,
            "seed": self.seed,
            "exact": {
                "full_norm": full,
                "choice_share": self.exact.choice.norm().item() / full,
                "scale_share": self.exact.scale.norm().item() / full,
                "autograd_difference": (self.exact.autograd - self.exact.full).norm().item() / full,
                "argmax_probability": self.exact.probabilities.max(1).values.mean().item(),
            },
            "masking": self.masking(),
            "estimators": [self._row(index) for index in range(len(self.figures))],
            "orders": [
                {"estimator": found.method.label, "steps": list(found.steps), "errors": list(found.errors), "order": found.order}
                for found in self.orders
            ],
        }

    def _row(self, index: int) -> Dict[str, Any]:
        found, full = self.figures[index], self.exact.full
        return {
            "estimator": found.method.label,
            "aim": found.method.aim,
            "argmax_rule": found.method.argmax_rule,
            "experts": self.experts(found.method),
            "time": self.times.get(found.method.label),
            **{name: value for name, value in vars(found).items() if name != "method"},
            "unbiased": found.unbiased,
            "history": [[draws, ((mean - full).norm() / full.norm()).item()] for draws, mean in self.moments[index].history],
        }

    def experts(self, method: Method) -> int:
        """Experts run per token in training."""
        return self.problem.logits.size(1) if method.experts is None else method.experts


def study(
    problem: Problem, methods: List[Method], draws: Optional[int] = None, seed: int = 1, orders: bool = True
) -> FidelityStudy:
    """Measure the methods on the problem over `draws` draws; None: in exact expectation."""
    exact = exact_gradient(problem)
    figures, moments = measure(problem, exact, methods, draws, seed)
    return FidelityStudy(
        problem=problem,
        exact=exact,
        figures=figures,
        moments=moments,
        orders=order_of_convergence(problem, methods) if orders else [],
        times=relative_times(methods, problem.logits.size(1), seed),
        unmasked=exact_gradient(replace(problem, jitter_eps=None)) if problem.masked else None,
        draws=draws,
        seed=seed,
    )
