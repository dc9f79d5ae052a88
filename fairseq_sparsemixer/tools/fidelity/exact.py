"""The exact gradient of E_{D~pi}[g(pi_D f_D)] with respect to the router's logits, by enumerating all experts.

Written from the formula, independent of the estimators and gates that are compared with it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fairseq_sparsemixer.tools.fidelity.problem import Problem


@dataclass(frozen=True)
class ExactGradient:
    """Both terms [S, E]. `autograd` [S, E] is their sum computed another way, by differentiating the enumerated expectation.

    choice: sum_i g(a_i) d pi_i, which expert is chosen. scale: sum_i pi_i g'(a_i) f_i d pi_i, how the chosen expert is
    scaled. a_i = pi_i f_i. probabilities: [S, E], the masked softmax.
    """

    choice: Tensor
    scale: Tensor
    autograd: Tensor
    probabilities: Tensor

    @property
    def full(self) -> Tensor:
        """The gradient, [S, E]."""
        return self.choice + self.scale


def masked_softmax(problem: Problem) -> Tensor:
    """pi [S, E]; expert i is masked if (theta_max - theta_i) / max(|theta_i|, theta_max) > 2 eps (arXiv 2310.00811)."""
    logits = problem.logits
    if not problem.masked:
        return logits.softmax(-1)
    top = logits.max(-1, keepdim=True).values
    gap = top - logits
    stays = gap <= 2 * problem.mask_eps * torch.maximum(logits.abs(), top.expand_as(logits))
    return torch.where(stays, logits, logits.new_tensor(float("-inf"))).softmax(-1)


def exact_gradient(problem: Problem) -> ExactGradient:
    """Enumerate all experts for every token."""
    probabilities = masked_softmax(problem)
    outputs = problem.outputs.transpose(0, 1)  # [E, S, M]
    steps = (probabilities.t().unsqueeze(-1) * outputs).requires_grad_()  # a_i, [E, S, M]
    losses = problem.loss(steps)  # [E, S]
    (slopes,) = torch.autograd.grad(losses.sum(), steps)
    along = (slopes * outputs).sum(-1)  # g'(a_i) f_i, [E, S]
    return ExactGradient(
        choice=_through_softmax(losses.detach().t(), probabilities),
        scale=_through_softmax(probabilities * along.t(), probabilities),
        autograd=_differentiated_expectation(problem),
        probabilities=probabilities,
    )


def _through_softmax(coefficients: Tensor, probabilities: Tensor) -> Tensor:
    """sum_i c_i d pi_i / d theta_j = pi_j (c_j - sum_i pi_i c_i), [S, E]."""
    return probabilities * (coefficients - (probabilities * coefficients).sum(-1, keepdim=True))


def _differentiated_expectation(problem: Problem) -> Tensor:
    stays = masked_softmax(problem) > 0
    logits = problem.logits.clone().requires_grad_()
    probabilities = torch.where(stays, logits, logits.new_tensor(float("-inf"))).softmax(-1)
    losses = problem.loss(probabilities.t().unsqueeze(-1) * problem.outputs.transpose(0, 1))  # [E, S]
    (gradient,) = torch.autograd.grad((probabilities.t() * losses).sum(), logits)
    return gradient
