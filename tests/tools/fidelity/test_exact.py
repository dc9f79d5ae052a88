"""The exact gradient: the enumeration, compared with explicit sums and with differentiation."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_sparsemixer.tools.fidelity import LOSSES, Problem, exact_gradient, synthetic_problem


def written_out(logits, outputs, loss):
    """Both terms of one token as Python sums: logits [E], outputs [E][M], loss a function of a list of M numbers."""
    E = len(logits)
    total = sum(math.exp(theta) for theta in logits)
    pi = [math.exp(theta) / total for theta in logits]
    choice, scale = [0.0] * E, [0.0] * E
    for i in range(E):
        a = [pi[i] * f for f in outputs[i]]
        eps = 1e-6
        further, nearer = ([x + sign * eps * f for x, f in zip(a, outputs[i])] for sign in (1, -1))
        slope = (loss(further) - loss(nearer)) / (2 * eps)
        for j in range(E):
            d = pi[i] * ((i == j) - pi[j])  # d pi_i / d theta_j
            choice[j] += loss(a) * d
            scale[j] += pi[i] * slope * d
    return choice, scale


def test_both_terms_equal_the_sums_of_the_formula():
    logits, outputs = [0.3, -1.2, 0.9], [[1.0, 2.0], [-0.5, 0.3], [0.7, -1.1]]
    choice, scale = written_out(logits, outputs, lambda y: math.sin(y[0]) + y[0] * y[1] ** 2)
    problem = Problem(
        tokens=torch.ones(1, 1).double(),
        logits=torch.tensor([logits]).double(),
        outputs=torch.tensor([outputs]).double(),
        loss=lambda y: y[..., 0].sin() + y[..., 0] * y[..., 1] ** 2,
    )
    exact = exact_gradient(problem)
    torch.testing.assert_close(exact.choice[0], torch.tensor(choice).double(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(exact.scale[0], torch.tensor(scale).double(), rtol=1e-6, atol=1e-9)


@settings(max_examples=30)
@given(
    loss=st.sampled_from(list(LOSSES)),
    tokens=st.integers(1, 5),
    experts=st.integers(1, 6),
    jitter=st.sampled_from([None, 0.05, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_the_terms_sum_to_the_derivative_of_the_enumerated_expectation(loss, tokens, experts, jitter, seed):
    exact = exact_gradient(synthetic_problem(loss, tokens, experts, 3, jitter, seed=seed))
    torch.testing.assert_close(exact.full, exact.autograd, rtol=1e-10, atol=1e-12)


def test_masked_experts_have_no_gradient():
    problem = synthetic_problem("cross-entropy", jitter_eps=0.1)
    exact = exact_gradient(problem)
    masked = exact.probabilities == 0
    assert masked.any() and not masked.all()
    assert (exact.full[masked] == 0).all()


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(ValueError, match="--loss hinge is unknown; choose from cross-entropy, quadratic, cubic"):
        synthetic_problem("hinge")
