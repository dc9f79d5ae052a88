"""Measurements over draws: noise, bias, and how to distinguish them."""

from math import log

import pytest
import torch

from fairseq_sparsemixer.tools.fidelity import (
    METHODS,
    exact_gradient,
    measure,
    sampled_moments,
    select_methods,
    synthetic_problem,
)

METHOD = {method.label: method for method in METHODS}
QUADRATIC = dict(loss="quadratic", tokens=4, num_experts=4, model_dim=4)


def test_midpoints_measured_bias_on_a_quadratic_decreases_with_the_root_of_the_draws():
    problem = synthetic_problem(**QUADRATIC)
    full = exact_gradient(problem).full
    sizes, seeds = [256, 1024, 4096, 16384], range(12)

    def square(draws, seed):
        return (sampled_moments(METHOD["midpoint*"], problem, draws, seed).mean - full).square().sum().item()

    squares = [sum(square(draws, 100 * draws + seed) for seed in seeds) for draws in sizes]
    slope = (log(squares[-1]) - log(squares[0])) / 2 / (log(sizes[-1]) - log(sizes[0]))
    assert slope == pytest.approx(-0.5, abs=0.1)


def test_sampling_noise_is_distinguished_from_bias():
    problem = synthetic_problem(**QUADRATIC)
    exact = exact_gradient(problem)
    found = {f.method.label: f for f in measure(problem, exact, select_methods(["midpoint", "euler", "switch"]), 20_000, 1)[0]}
    assert found["midpoint*"].unbiased and abs(found["midpoint*"].z) < 4
    assert found["midpoint*"].bias_aim < 3 * found["midpoint*"].noise_aim
    assert found["switch"].unbiased and found["switch"].bias_full > 0.1
    assert not found["euler"].unbiased and found["euler"].z > 10


def test_the_figures_depend_only_on_the_seed():
    problem = synthetic_problem(**QUADRATIC)
    means = [sampled_moments(METHOD["midpoint"], problem, 500, seed).mean for seed in (5, 5, 6)]
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


def test_measuring_does_not_change_the_random_state():
    before = torch.get_rng_state()
    sampled_moments(METHOD["midpoint"], synthetic_problem(**QUADRATIC), 100, 1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draws", [2, 64, 100, 3000])
def test_the_history_doubles_and_ends_with_all_draws(draws):
    moments = sampled_moments(METHOD["euler"], synthetic_problem(**QUADRATIC), draws, 1)
    counts = [count for count, _ in moments.history]
    assert counts == [n for n in (64, 128, 256, 512, 1024, 2048) if n < draws] + [draws]
    assert torch.equal(moments.history[-1][1], moments.mean)


def test_figures_of_the_projection_follow_by_the_chain_rule():
    problem = synthetic_problem(**QUADRATIC)
    exact = exact_gradient(problem)
    figures, moments = measure(problem, exact, [METHOD["euler"]])
    expected = exact.full.t() @ problem.tokens
    found = moments[0].mean.t() @ problem.tokens
    assert figures[0].projection_bias == pytest.approx(((found - expected).norm() / expected.norm()).item())
