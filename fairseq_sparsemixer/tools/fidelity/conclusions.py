"""Conclusions from a fidelity study that its table does not show at a glance, one sentence each."""

from typing import List

from fairseq_sparsemixer.tools.fidelity.study import FidelityStudy


def conclusions(study: FidelityStudy) -> List[str]:
    """The sentences that apply to this study."""
    sentences = (_terms(study), _unbiased(study), _argmax_rule(study), _masking(study))
    return [sentence for sentence in sentences if sentence]


def _terms(study: FidelityStudy) -> str:
    choice, scale, norm = study.exact.choice, study.exact.scale, study.exact.full.norm()
    cosine = (choice * scale).sum() / (choice.norm() * scale.norm())
    return (
        f"The choice term is {choice.norm() / norm:.2f} of the exact gradient's norm and the scale term"
        f" {scale.norm() / norm:.2f}; their cosine is {cosine:.3f}."
    )


def _unbiased(study: FidelityStudy) -> str:
    names = [found.method.label for found in study.figures if found.unbiased]
    limit = "" if study.draws is None else f", within the noise of {study.draws:,} draws"
    return f"Unbiased{limit}: {', '.join(names)}." if names else ""


def _argmax_rule(study: FidelityStudy) -> str:
    biases = {(found.method.name, found.method.argmax_rule): found.bias_aim for found in study.figures}
    pairs = [
        f"{name} {bias:.1%} and {biases[name, False]:.1%}"
        for (name, rule), bias in biases.items()
        if rule and (name, False) in biases
    ]
    if not pairs:
        return ""
    share = study.exact.probabilities.max(1).values.mean()
    return f"Bias with and without the arg-max rule: {', '.join(pairs)}; the arg-max expert is drawn {share:.1%} of the time."


def _masking(study: FidelityStudy) -> str:
    masking = study.masking()
    if masking is None:
        return ""
    return (
        f"Masking at jitter {study.problem.jitter_eps:g} leaves {masking['experts']:.1f} of {study.problem.logits.size(1)}"
        f" experts per token, removes {masking['lost_probability']:.1%} of the probability, and changes the exact gradient by"
        f" {masking['gradient_change']:.1%} of its norm; biases are against the masked gradient."
    )
