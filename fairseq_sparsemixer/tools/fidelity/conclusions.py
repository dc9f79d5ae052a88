"""What a reader may conclude from a fidelity study, in words made from its figures."""

from typing import Dict, List

from fairseq_sparsemixer.tools.fidelity.measure import Fidelity
from fairseq_sparsemixer.tools.fidelity.methods import FULL
from fairseq_sparsemixer.tools.fidelity.study import FidelityStudy


def conclusions(study: FidelityStudy) -> List[str]:
    """Sentences that the figures support, and no others."""
    by_label = {found.method.label: found for found in study.figures}
    return [
        *_exact_gradient(study),
        *_unbiased(study),
        *_scale_term(study, by_label),
        *_argmax_rule(study),
        *_variance(by_label),
        *_masking(study),
    ]


def _exact_gradient(study: FidelityStudy) -> List[str]:
    choice, scale, full = study.exact.choice, study.exact.scale, study.exact.full
    cosine = (choice * scale).sum() / (choice.norm() * scale.norm())
    return [
        f"The choice term is {choice.norm() / full.norm():.2f} times as long as the exact gradient and the scale term"
        f" {scale.norm() / full.norm():.2f} times; the cosine between the two is {cosine:.3f}."
    ]


def _unbiased(study: FidelityStudy) -> List[str]:
    sampled = "" if study.draws is None else f", as far as {study.draws:,} draws can tell"
    free = [found for found in study.figures if found.unbiased]
    sentences = []
    if free:
        aims = ", ".join(f"{found.method.label} (of the {found.method.aim} gradient)" for found in free)
        sentences.append(f"Unbiased here{sampled}: {aims}.")
    biased = sorted((found for found in study.figures if not found.unbiased), key=lambda found: found.bias_aim)
    if biased:
        aims = ", ".join(f"{found.method.label} {_percent(found.bias_aim)}" for found in biased)
        sentences.append(f"Biased against what they aim at, from the least to the most: {aims}.")
    return sentences


def _scale_term(study: FidelityStudy, by_label: Dict[str, Fidelity]) -> List[str]:
    sentences = []
    neither = "masks none and always runs" if study.problem.masked else "always runs"
    if "switch" in by_label:
        switch = by_label["switch"]
        sentences.append(
            f"switch on a sampled expert estimates the scale term alone: its mean is off the full gradient by"
            f" {_percent(switch.bias_full)} of its length, at a cosine of {switch.cosine:.3f}."
        )
    if "switch-argmax" in by_label:
        switch = by_label["switch-argmax"]
        sentences.append(
            f"The switch router, which {neither} the arg-max expert, is off by {_percent(switch.bias_full)}, at a cosine of"
            f" {switch.cosine:.3f}: another objective's gradient."
        )
    if "heun3" in by_label:
        heun = by_label["heun3"]
        sentences.append(
            "heun3, at gain 1, estimates the choice term alone: its mean is off the full gradient by"
            f" {_percent(heun.bias_full)}, at a cosine of {heun.cosine:.3f}; near 1, the difference is mostly a matter of length."
        )
    return sentences


def _argmax_rule(study: FidelityStudy) -> List[str]:
    pairs: Dict[str, Dict[bool, Fidelity]] = {}
    for found in study.figures:
        if found.method.argmax_rule is not None:
            pairs.setdefault(found.method.name, {})[found.method.argmax_rule] = found
    texts = [
        f"{name} {_percent(pair[True].bias_aim)} with it and {_percent(pair[False].bias_aim)} without"
        for name, pair in pairs.items()
        if len(pair) == 2
    ]
    if not texts:
        return []
    share = study.exact.probabilities.max(1).values.mean()
    sentences = [
        "The arg-max rule, by which the most probable expert is estimated to first order only (it is drawn"
        f" {_percent(share.item())} of the time), decides the bias: {'; '.join(texts)}."
    ]
    ruled = {name: pair[True].bias_aim for name, pair in pairs.items() if pair[True].method.aim == FULL}
    euler = next((found.bias_aim for found in study.figures if found.method.name == "euler"), float("inf"))
    worse = [name for name, bias in ruled.items() if bias > euler]
    if worse:
        sentences.append(
            f"With the rule, {' and '.join(worse)} end up with more bias than plain euler ({_percent(euler)}): the first-order"
            " errors of all experts partly cancel in the softmax's contrast, and correcting all but the arg-max's undoes that."
        )
    return sentences


def _variance(by_label: Dict[str, Fidelity]) -> List[str]:
    if "midpoint" not in by_label or "reinforce" not in by_label:
        return []
    midpoint, plain = by_label["midpoint"].variance, by_label["reinforce"].variance
    text = f"One draw of midpoint has {_ratio(midpoint, plain)} the variance of plain REINFORCE"
    if "reinforce-baseline" in by_label:
        text += f", and {_ratio(midpoint, by_label['reinforce-baseline'].variance)} that of REINFORCE with the baseline g(0)"
        text += ", which runs the downstream loss a second time"
    return [text + "."]


def _masking(study: FidelityStudy) -> List[str]:
    masking = study.masking()
    if masking is None:
        return []
    jitter, num_experts = study.problem.jitter_eps, study.problem.logits.size(1)
    return [
        f"Masking at jitter {jitter:g} leaves {masking['experts']:.1f} of {num_experts} experts a token and takes out"
        f" {_percent(masking['lost_probability'])} of the probability. The biases above are against the masked objective; its"
        f" exact gradient differs from the unmasked one by {_percent(masking['gradient_change'])}."
    ]


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if value >= 1e-4 else f"{100 * value:.1g}%"


def _ratio(value: float, reference: float) -> str:
    return f"{value / reference:.2g} times" if reference else "incomparably"
