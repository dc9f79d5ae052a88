"""The exact expectation of each estimator over expert and coin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.tools.fidelity import (
    LOSSES,
    METHODS,
    enumerated_moments,
    exact_gradient,
    sampled_moments,
    select_methods,
    synthetic_problem,
)

METHOD = {method.label: method for method in METHODS}


def error(label, problem, term):
    """|expectation - term| / |term|."""
    target = getattr(exact_gradient(problem), term)
    return ((enumerated_moments(METHOD[label], problem).mean - target).norm() / target.norm()).item()


@pytest.mark.parametrize("jitter", [None, 0.1])
def test_midpoint_is_exact_for_quadratic_losses(jitter):
    assert error("midpoint*", synthetic_problem("quadratic", jitter_eps=jitter), "full") < 1e-10


@pytest.mark.parametrize("loss", ["quadratic", "cubic"])
def test_third_order_heun_is_exact_for_cubic_losses_and_estimates_only_the_choice_term(loss):
    problem = synthetic_problem(loss)
    assert error("heun3*", problem, "choice") < 1e-10
    assert error("heun3*", problem, "full") > 0.1


@pytest.mark.parametrize("loss", list(LOSSES))
def test_the_integral_estimator_is_exact_for_smooth_losses(loss):
    assert error("inf*", synthetic_problem(loss), "full") < 1e-10


@pytest.mark.parametrize("loss", list(LOSSES))
def test_euler_is_not_exact(loss):
    assert error("euler", synthetic_problem(loss), "full") > 0.05


def test_midpoint_is_not_exact_for_cubic_losses():
    assert error("midpoint*", synthetic_problem("cubic"), "full") > 1e-4


@pytest.mark.parametrize("loss", list(LOSSES))
def test_switch_estimates_only_the_scale_term(loss):
    problem = synthetic_problem(loss)
    assert error("switch", problem, "scale") < 1e-10
    assert error("switch", problem, "full") > 0.1


@pytest.mark.parametrize("label", ["midpoint", "heun3", "inf"])
def test_the_argmax_rule_costs_bias(label):
    problem = synthetic_problem("quadratic")
    assert error(label, problem, METHOD[label].aim) > 0.05
    assert error(f"{label}*", problem, METHOD[label].aim) < 1e-10


def test_default_moe_has_the_gradient_of_every_expert_with_means_for_those_that_do_not_run():
    problem = synthetic_problem("cross-entropy", tokens=6, num_experts=3, model_dim=4)
    f, best = problem.outputs, problem.logits.argmax(-1).tolist()
    means = [[f[s, e] for s in range(6) if best[s] == e] for e in range(3)]
    means = [sum(outputs) / len(outputs) if outputs else torch.zeros(4).double() for outputs in means]
    logits = problem.logits.clone().requires_grad_()
    pi = logits.softmax(-1)
    outputs = [sum(pi[s, e] * (f[s, e] if e == best[s] else means[e]) for e in range(3)) for s in range(6)]
    (expected,) = torch.autograd.grad(problem.loss(torch.stack(outputs)).sum(), logits)
    torch.testing.assert_close(enumerated_moments(METHOD["default_moe"], problem).mean, expected)


@pytest.mark.parametrize("label", ["reinforce", "reinforce-baseline"])
@pytest.mark.parametrize("jitter", [None, 0.1])
def test_reinforce_is_unbiased(label, jitter):
    assert error(label, synthetic_problem("cross-entropy", jitter_eps=jitter), "full") < 1e-10


@pytest.mark.slow
@settings(max_examples=25)
@given(
    method=st.sampled_from(METHODS),
    tokens=st.integers(1, 4),
    experts=st.integers(1, 5),
    jitter=st.sampled_from([None, 0.1]),
    seed=st.integers(0, 99),
)
def test_the_probabilities_of_every_tokens_outcomes_sum_to_one(method, tokens, experts, jitter, seed):
    problem = synthetic_problem("cubic", tokens, experts, 3, jitter, seed=seed)
    outcomes = method.outcomes(problem)
    torch.testing.assert_close(outcomes.probability.sum(0), torch.ones(tokens).double())
    assert outcomes.gradient.isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("jitter", [None, 0.3])
def test_draws_have_the_enumerated_mean_and_variance(method, jitter):
    problem = synthetic_problem("cross-entropy", tokens=3, num_experts=4, model_dim=4, jitter_eps=jitter)
    drawn, exact = sampled_moments(method, problem, 20_000, seed=3), enumerated_moments(method, problem)
    variance = exact.covariance.diagonal(dim1=1, dim2=2).sum()
    assert (drawn.mean - exact.mean).norm() <= 4 * (variance / drawn.draws).sqrt() + 1e-12
    assert abs(drawn.covariance.diagonal(dim1=1, dim2=2).sum() - variance) <= 0.1 * variance + 1e-12


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="--estimators simpson is unknown; choose from switch-argmax, switch, euler"):
        select_methods(["midpoint", "simpson"])


def test_selecting_a_method_includes_both_variants_of_the_argmax_rule():
    assert [method.label for method in select_methods(["midpoint"])] == ["midpoint", "midpoint*"]
