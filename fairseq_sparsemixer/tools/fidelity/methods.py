"""Methods that estimate the router's gradient: the package's estimators and routers, and REINFORCE for comparison.

Each gives gradients of the router's logits, either sampled or for each outcome (expert and node) with its probability.
The gradients come from the production code's autograd functions.
"""

from dataclasses import dataclass, replace
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.estimators import ESTIMATORS, Estimator, get_estimator
from fairseq_sparsemixer.moe.gates.default_moe import default_moe_routing
from fairseq_sparsemixer.moe.gates.dense_st import dense_st_routing
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.sparsemixer import draw_expert, draw_sampling_noise, mask_unlikely
from fairseq_sparsemixer.moe.gates.switch import switch_routing
from fairseq_sparsemixer.tools.fidelity.problem import Problem

CHOICE, SCALE, FULL = "choice", "scale", "full"  # the terms of the exact gradient that a method can aim at


class Outcomes(NamedTuple):
    """The gradient [O, S, E] of each of O outcomes, and its probability [O, S] for each token."""

    gradient: Tensor
    probability: Tensor


def router_gradient(problem: Problem, count: int, losses: Callable[[Tensor], Tensor]) -> Tensor:
    """Gradients [count, S, E] of the losses [count, S] computed from `count` copies of the logits [count, S, E]."""
    logits = problem.logits.expand(count, -1, -1).clone().requires_grad_()
    return torch.autograd.grad(losses(logits).sum(), logits)[0]


@dataclass(frozen=True)
class Method:
    """name: as in tables. aim: the term of the exact gradient it estimates. experts: the number run per token in training;
    None: all. argmax_rule: whether the arg-max expert is estimated to first order; None: not applicable.
    """

    name: str
    aim: str
    experts: Optional[int] = 1
    argmax_rule: Optional[bool] = None

    @property
    def label(self) -> str:
        """The name, with a star if the arg-max rule is off."""
        return f"{self.name}*" if self.argmax_rule is False else self.name

    def sample(self, problem: Problem, draws: int) -> Tensor:
        """Gradients [draws, S, E], sampled with torch's default generator."""
        raise NotImplementedError

    def outcomes(self, problem: Problem) -> Outcomes:
        """All outcomes, without sampling."""
        raise NotImplementedError


@dataclass(frozen=True)
class SampledExpert(Method):
    """One of estimators.ESTIMATORS, which draws an expert from pi and a node."""

    estimator: Estimator = None  # type: ignore[assignment]  # always given; a default because fields before it have one

    def sample(self, problem: Problem, draws: int) -> Tensor:
        def losses(logits: Tensor) -> Tensor:
            flat = logits.flatten(0, 1)
            draw = draw_expert(flat, problem.mask_eps, self.estimator, draw_sampling_noise(flat))
            return problem.loss_of(draw.expert_index.view(logits.shape[:-1]), draw.weight.view(logits.shape[:-1]))

        return router_gradient(problem, draws, losses)

    def outcomes(self, problem: Problem) -> Outcomes:
        S, E = problem.logits.shape
        nodes, weights = problem.logits.new_tensor(self.estimator.quadrature).t()  # [Q] each
        expert = torch.arange(E).view(E, 1, 1).expand(E, len(nodes), S).flatten(0, 1)  # [O, S], O = E Q
        node = nodes.view(1, -1, 1).expand(E, -1, S).flatten(0, 1)
        if self.estimator.first_order_argmax:
            node = torch.where(expert == problem.logits.argmax(-1), torch.ones_like(node), node)

        def losses(logits: Tensor) -> Tensor:
            chosen = _chosen(problem, logits, expert)
            return problem.loss_of(expert, self.estimator.multiplier_at(chosen, node))

        probability = _chosen(problem, problem.logits.expand(len(expert), -1, -1), expert)
        weight = weights.view(1, -1, 1).expand(E, -1, S).flatten(0, 1)
        return Outcomes(router_gradient(problem, len(expert), losses), probability * weight)


@dataclass(frozen=True)
class Reinforce(Method):
    """The gradient of g plus (g - b) grad log pi_D (Williams, 1992), unbiased; b = 0, or g(0) with `baseline`."""

    baseline: bool = False

    def sample(self, problem: Problem, draws: int) -> Tensor:
        flat = problem.logits.expand(draws, -1, -1).flatten(0, 1)
        expert = draw_expert(flat, problem.mask_eps, get_estimator("switch"), draw_sampling_noise(flat)).expert_index
        return self._gradient(problem, expert.view(draws, -1))

    def outcomes(self, problem: Problem) -> Outcomes:
        S, E = problem.logits.shape
        expert = torch.arange(E).unsqueeze(1).expand(E, S)
        probability = _chosen(problem, problem.logits.expand(E, -1, -1), expert)
        return Outcomes(self._gradient(problem, expert), probability)

    def _gradient(self, problem: Problem, expert: Tensor) -> Tensor:
        baseline = problem.loss(torch.zeros_like(problem.outputs[:, 0])) if self.baseline else 0.0

        def losses(logits: Tensor) -> Tensor:
            chosen = _chosen(problem, logits, expert)
            value = problem.loss_of(expert, chosen)
            tiny = torch.finfo(chosen.dtype).tiny  # log(0) of a masked expert, whose probability is 0
            return value + (value.detach() - baseline) * chosen.clamp(min=tiny).log()

        return router_gradient(problem, len(expert), losses)


@dataclass(frozen=True)
class Deterministic(Method):
    """A router that does not sample, given by its routing function of logits [S, E]."""

    routing: Callable[[Tensor], Routing] = None  # type: ignore[assignment]  # as in SampledExpert

    def sample(self, problem: Problem, draws: int) -> Tensor:
        return self.outcomes(problem).gradient.expand(draws, -1, -1)

    def route(self, problem: Problem, logits: Tensor) -> Routing:
        """The routing for logits [S, E]."""
        return self.routing(logits)

    def outcomes(self, problem: Problem) -> Outcomes:
        def losses(logits: Tensor) -> Tensor:
            routing = self.route(problem, logits[0])
            outputs = problem.outputs.gather(1, routing.expert_index.unsqueeze(-1).expand(-1, -1, problem.outputs.size(2)))
            output = (routing.combine_weight.unsqueeze(-1) * outputs).sum(1)
            if routing.default is not None:
                output = output + routing.default.weight @ routing.default.vectors
            return problem.loss(output.unsqueeze(0))

        return Outcomes(router_gradient(problem, 1, losses), torch.ones_like(problem.logits[None, :, 0]))


@dataclass(frozen=True)
class DefaultMoE(Deterministic):
    """The default_moe router once its averages have settled: the mean of an expert's outputs over the problem's tokens that
    it runs for, zero without any.
    """

    def route(self, problem: Problem, logits: Tensor) -> Routing:
        """See Deterministic."""
        S, E = problem.logits.shape
        best = problem.logits.argmax(-1)
        runs = torch.nn.functional.one_hot(best, E).to(problem.outputs.dtype)  # [S, E]
        sums = runs.t() @ problem.outputs[torch.arange(S), best]  # [E, M]
        return default_moe_routing(logits, None, 1, sums / runs.sum(0).clamp(min=1).unsqueeze(-1))


def _chosen(problem: Problem, logits: Tensor, expert: Tensor) -> Tensor:
    """The probability [..., S] of expert [..., S] under the gates' masked softmax of logits [..., S, E]."""
    return mask_unlikely(logits, problem.mask_eps).softmax(-1).gather(-1, expert.unsqueeze(-1)).squeeze(-1)


def _estimator_methods() -> List[Method]:
    aims = {"switch": SCALE}
    methods: List[Method] = []
    for estimator in ESTIMATORS.values():
        aim = aims.get(estimator.name, FULL if estimator.keeps_scale_term else CHOICE)
        if estimator.deterministic:
            methods.append(SampledExpert(estimator.name, aim, estimator=estimator))
            continue
        for rule in (True, False):
            ruled = replace(estimator, first_order_argmax=rule)
            methods.append(SampledExpert(estimator.name, aim, argmax_rule=rule, estimator=ruled))
    return methods


METHODS: List[Method] = [
    Deterministic("switch-argmax", SCALE, routing=switch_routing),
    *_estimator_methods(),
    Reinforce("reinforce", FULL),
    Reinforce("reinforce-baseline", FULL, baseline=True),
    DefaultMoE("default_moe", FULL),
    Deterministic("dense_st", FULL, experts=None, routing=lambda logits: dense_st_routing(logits, None, 1, True)),
]


def select_methods(names: Optional[Sequence[str]] = None) -> List[Method]:
    """The methods with these names; None: all. Raises ValueError, listing the known names, for an unknown one."""
    known: Dict[str, None] = dict.fromkeys(method.name for method in METHODS)
    for name in names or ():
        if name not in known:
            raise ValueError(f"--estimators {name} is unknown; choose from {', '.join(known)}")
    return [method for method in METHODS if not names or method.name in names]
