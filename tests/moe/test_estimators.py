"""The estimators, compared with exact calculus: polynomials in one variable, explicit derivatives, float64."""

import copy
import dataclasses
import pickle

import pytest
import torch

from fairseq_sparsemixer.moe.estimators import ESTIMATORS, get_estimator

GAIN = {"switch": 1, "euler": 2, "midpoint": 2, "heun3": 1, "inf": 2}
# the degree up to which the quadrature of g(a) - g(0) by g' is exact
EXACT_DEGREE = {"euler": 1, "midpoint": 2, "heun3": 3, "inf": 8}


def polynomial(degree):
    """(coefficients, g, g') of a random polynomial g of the given degree."""
    coefficients = torch.randn(degree + 1, dtype=torch.float64)

    def g(x):
        return sum(c * x**power for power, c in enumerate(coefficients.tolist()))

    def derivative(x):
        return sum(power * c * x ** (power - 1) for power, c in enumerate(coefficients.tolist()) if power)

    return g, derivative


def softmax_jacobian(pi):
    """[i, j]: the derivative of pi_i with respect to logit j."""
    return torch.diag(pi) - pi.unsqueeze(1) * pi.unsqueeze(0)


def expected_gradient(estimator, logits, outputs, g):
    """The expected router gradient over experts and nodes, by enumeration, with the estimator's backward."""
    pi = logits.softmax(0)
    total = torch.zeros_like(logits)
    for expert in range(len(logits)):
        for node, weight in estimator.quadrature:
            multiplier = estimator.multiplier_at(pi[expert], torch.tensor(node, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(g(multiplier * outputs[expert]), logits, retain_graph=True)
            total += pi[expert].detach() * weight * gradient
    return total


@pytest.mark.parametrize("name", sorted(EXACT_DEGREE))
def test_the_expectation_is_exact_for_polynomials_up_to_the_estimators_order(name):
    estimator = ESTIMATORS[name]
    g, derivative = polynomial(EXACT_DEGREE[name])
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(5, dtype=torch.float64)
    pi = logits.detach().softmax(0)
    a = pi * outputs
    which = (g(a) - g(torch.zeros_like(a))) @ softmax_jacobian(pi)  # grad 0
    scale = (pi * derivative(a) * outputs) @ softmax_jacobian(pi)  # grad 1
    exact = which + scale if estimator.keeps_scale_term else which
    torch.testing.assert_close(expected_gradient(estimator, logits, outputs, g), exact, rtol=1e-10, atol=1e-12)


def test_midpoints_expectation_is_the_midpoint_rule_plus_the_scale_term():
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    outputs = 3 * torch.randn(6, dtype=torch.float64)
    pi = logits.detach().softmax(0)
    a = pi * outputs  # g = sin, g' = cos: not a polynomial
    reference = (a * torch.cos(a / 2) + pi * outputs * torch.cos(a)) @ softmax_jacobian(pi)
    torch.testing.assert_close(expected_gradient(ESTIMATORS["midpoint"], logits, outputs, torch.sin), reference)


def test_switchs_expectation_is_the_scale_term_only():
    logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(6, dtype=torch.float64)
    pi = logits.detach().softmax(0)
    reference = (pi * outputs * torch.cos(pi * outputs)) @ softmax_jacobian(pi)
    torch.testing.assert_close(expected_gradient(ESTIMATORS["switch"], logits, outputs, torch.sin), reference)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_nodes_are_drawn_with_their_probabilities(name):
    estimator = dataclasses.replace(ESTIMATORS[name], first_order_argmax=False)
    count = 40000
    coin = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    nodes = estimator.multiplier(torch.ones_like(coin), coin, torch.ones_like(coin, dtype=torch.bool))
    for power in (1, 2, 3):
        expected = sum(weight * node**power for node, weight in estimator.quadrature)
        assert (nodes**power).mean().item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_backward_passes_the_gain_to_the_probability(name):
    coin = torch.rand(50, dtype=torch.float64)
    probability = torch.rand(50, dtype=torch.float64, requires_grad=True)
    is_argmax = torch.arange(50) % 3 == 0
    multiplier = ESTIMATORS[name].multiplier(probability, coin, is_argmax)
    upstream = torch.randn(50, dtype=torch.float64)
    multiplier.backward(upstream)
    torch.testing.assert_close(probability.grad, GAIN[name] * upstream)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_the_argmax_expert_is_never_scaled_down(name):
    coin = torch.rand(200, dtype=torch.float64)
    probability = torch.rand(200, dtype=torch.float64)
    multiplier = ESTIMATORS[name].multiplier(probability, coin, torch.ones(200, dtype=torch.bool))
    assert torch.equal(multiplier, probability)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_an_estimator_can_be_pickled_and_copied(name):
    estimator = ESTIMATORS[name]
    assert pickle.loads(pickle.dumps(estimator)) == estimator == copy.deepcopy(estimator)


def test_the_nodes_are_exact_in_float64():
    coin = torch.tensor([0.9], dtype=torch.float64)
    assert ESTIMATORS["heun3"].node(coin).item() == 1 / 3


def test_an_unknown_estimator_lists_the_known_ones():
    with pytest.raises(ValueError, match="gradient_estimator=simpson is unknown; choose from switch, euler, midpoint"):
        get_estimator("simpson")
