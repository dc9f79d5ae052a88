"""Checks the flags of `fairseq-sparsemixer fidelity`, and builds the problem that they describe."""

import argparse

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.estimators import ESTIMATORS
from fairseq_sparsemixer.ranges import TOO_LARGE, Rule, broken_rule
from fairseq_sparsemixer.tools.fidelity.exact import exact_gradient
from fairseq_sparsemixer.tools.fidelity.losses import STEP, synthetic_problem
from fairseq_sparsemixer.tools.fidelity.measure import CHUNK
from fairseq_sparsemixer.tools.fidelity.problem import Problem

SYNTHETIC_TOKENS, TRAINED_TOKENS = 16, 64
SIZE = Rule(lambda x: x >= 1, "be at least 1", whole=True)  # check_size limits their product
NUMBERS = {  # flag -> allowed values
    "tokens": SIZE,
    "num_experts": Rule(lambda x: x >= 2, "be at least 2", whole=True),
    "model_dim": SIZE,
    "draws": Rule(lambda x: 2 <= x < TOO_LARGE, "be at least 2", whole=True),
    "step": Rule(lambda x: 1e-6 <= x <= 1e6, "be between 1e-06 and 1e+06, for float64 to distinguish losses"),
    "seed": Rule(lambda x: -(2**63) <= x < 2**63, "fit in 64 bits", whole=True),
}
OUTCOMES = 1 + max(len(estimator.quadrature) for estimator in ESTIMATORS.values())  # per expert, if enumerated
LARGEST = 2**29  # numbers, of 8 bytes each
SYNTHETIC = {"loss": "cross-entropy", "num_experts": 8, "model_dim": 16, "step": STEP}  # flags replaced by a checkpoint


def check(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for values out of range, and for incompatible flags."""
    for name, rule in NUMBERS.items():
        value = getattr(options, name)
        sentence = "" if value is None else broken_rule(f"--{name.replace('_', '-')}", value, rule)
        if sentence:
            raise ConfigurationError(sentence)
    if options.jitter_eps is not None and not options.jitter_eps > 0:
        raise ConfigurationError(f"--jitter-eps {options.jitter_eps:g} would mask all experts but one; give inf to mask none")
    if options.expectation and options.draws is not None:
        raise ConfigurationError(f"--expectation makes no draws; leave out --draws {options.draws}, or --expectation")
    if options.checkpoint:
        given = [name for name in SYNTHETIC if getattr(options, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ConfigurationError(f"--{flag} describes a synthetic problem; leave it out, or leave out --checkpoint")
        if not (options.text and options.target):
            raise ConfigurationError("--checkpoint needs sentences to run on: give --text FILE and --target FILE")
        if options.seed is not None and options.draws is None:
            raise ConfigurationError(f"--seed {options.seed} changes nothing without --draws, with --checkpoint; leave it out")
    else:
        for name in ("text", "target", "layer", "data_bin"):
            if getattr(options, name):
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)} needs --checkpoint FILE")


def check_size(tokens: int, num_experts: int, model_dim: int) -> None:
    """Raise ConfigurationError if tensors would be too large: [S, E, M], and [S, E] for each outcome or draw."""
    numbers = tokens * num_experts * max(model_dim, CHUNK, num_experts * OUTCOMES)
    if numbers > LARGEST:
        raise ConfigurationError(
            f"--tokens {tokens} with --num-experts {num_experts} and --model-dim {model_dim} needs {numbers:,} numbers at once;"
            f" choose smaller values, for at most {LARGEST:,}"
        )


def check_gradient(problem: Problem, options: argparse.Namespace) -> None:
    """Raise ConfigurationError if the exact gradient, whose squared norm divides figures, is too small or too large."""
    length = exact_gradient(problem).full.norm().item()
    if not 1e-140 < length < 1e140:
        remedy = "--layer, --text or --jitter-eps" if options.checkpoint else "--step or --jitter-eps"
        raise ConfigurationError(
            f"the router's exact gradient has norm {length:g}, too small or too large to compare with; change {remedy}"
        )


def build_problem(options: argparse.Namespace) -> Problem:
    """The problem the flags describe. Raises ConfigurationError or ValueError."""
    if not options.checkpoint:
        given = {name: getattr(options, name) for name in SYNTHETIC if getattr(options, name) is not None}
        tokens, jitter_eps, shape = options.tokens or SYNTHETIC_TOKENS, options.jitter_eps, {**SYNTHETIC, **given}
        check_size(tokens, shape["num_experts"], shape["model_dim"])
        return synthetic_problem(tokens=tokens, jitter_eps=jitter_eps, seed=options.seed, **shape)
    from fairseq_sparsemixer.tools.fidelity.trained import trained_problem  # needs fairseq

    return trained_problem(
        options.checkpoint,
        options.text,
        options.target,
        layer=options.layer,
        data_bin=options.data_bin,
        max_tokens=options.tokens or TRAINED_TOKENS,
        jitter_eps=options.jitter_eps,
    )
