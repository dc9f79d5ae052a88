"""The order of convergence in the step, for a smooth loss that is not a polynomial."""

import pytest

from fairseq_sparsemixer.tools.fidelity import METHODS, order_of_convergence, synthetic_problem
from fairseq_sparsemixer.tools.fidelity.convergence import fitted_order


@pytest.fixture(scope="module")
def orders():
    return {found.method.label: found.order for found in order_of_convergence(synthetic_problem("cross-entropy"), METHODS)}


@pytest.mark.parametrize("label, order", [("switch", 1), ("euler", 2), ("midpoint*", 3), ("heun3*", 4)])
def test_the_error_in_the_choice_term_decreases_with_the_methods_order(orders, label, order):
    assert orders[label] == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("label", ["midpoint", "heun3", "inf"])
def test_the_argmax_rule_makes_every_estimator_second_order(orders, label):
    assert orders[label] == pytest.approx(2, abs=0.1)


def test_an_exact_estimator_has_no_order(orders):
    assert orders["inf*"] is None


def test_the_order_is_the_slope_of_a_log_log_fit():
    steps = [1, 1 / 2, 1 / 4, 1 / 8]
    assert fitted_order(steps, [7 * step**2.5 for step in steps]) == pytest.approx(2.5)
