"""The conclusions under a fidelity study's table: each uses the study's own figures, or is omitted."""

from typing import Optional

import pytest

from fairseq_sparsemixer.tools.fidelity import select_methods, synthetic_problem
from fairseq_sparsemixer.tools.fidelity import study as studies
from fairseq_sparsemixer.tools.fidelity.conclusions import conclusions


@pytest.fixture
def conclude(monkeypatch):
    """conclude(*names, draws, jitter_eps) -> (study of these methods on a quadratic loss, its conclusions as text)."""
    monkeypatch.setattr(studies, "relative_times", lambda methods, num_experts, seed: {})

    def run(*names, draws: Optional[int] = None, jitter_eps: Optional[float] = None):
        problem = synthetic_problem("quadratic", tokens=4, num_experts=4, model_dim=4, jitter_eps=jitter_eps)
        found = studies.study(problem, select_methods(names), draws, orders=False)
        return found, " ".join(conclusions(found))

    return run


def test_only_estimators_without_bias_are_called_unbiased(conclude):
    _, text = conclude("euler", "midpoint", "reinforce")
    assert "Unbiased: midpoint*, reinforce." in text
    assert "Unbiased" not in conclude("euler")[1]


def test_with_draws_unbiased_means_within_their_noise(conclude):
    assert "Unbiased, within the noise of 500 draws: reinforce." in conclude("reinforce", draws=500)[1]


def test_the_bias_of_an_estimator_is_given_with_and_without_the_arg_max_rule(conclude):
    found, text = conclude("euler", "midpoint")
    bias = {figures.method.label: figures.bias_aim for figures in found.figures}
    assert f"midpoint {100 * bias['midpoint']:.1f}% and 0.0%;" in text
    assert "arg-max" not in conclude("euler")[1]


def test_masking_is_described_if_there_is_a_mask(conclude):
    found, text = conclude("euler", jitter_eps=0.1)
    masked = found.exact.probabilities == 0
    lost = found.unmasked.probabilities[masked].sum() / 4
    assert f"leaves {(~masked).sum() / 4:.1f} of 4 experts per token, removes {100 * lost:.1f}% of the probability" in text
    assert "Masking" not in conclude("euler")[1]
