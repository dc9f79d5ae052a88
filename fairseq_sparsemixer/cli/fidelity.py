"""Measure how close each gradient estimator comes to the exact gradient of the router.

Every expert is enumerated for every token in float64, which gives the exact gradient of E_D[g(pi_D f_D)] in two terms:
choice (which expert is chosen; Switch drops it) and scale (how the chosen one is scaled). Each estimator is then compared
with the term it aims at and with the full gradient, over many draws or, with --expectation, without sampling noise.

examples:
  fairseq-sparsemixer fidelity
  fairseq-sparsemixer fidelity --loss quadratic --expectation
  fairseq-sparsemixer fidelity --loss cubic --num-experts 16 --jitter-eps 0.1 --json fidelity.json --png fidelity.png
  fairseq-sparsemixer fidelity --checkpoint checkpoint_best.pt --text val.bpe.en --target val.bpe.de --layer encoder.layers.0
"""

import argparse

from rich.console import Console

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.estimators import ESTIMATORS
from fairseq_sparsemixer.fidelity.conclusions import conclusions
from fairseq_sparsemixer.fidelity.exact import exact_gradient
from fairseq_sparsemixer.fidelity.losses import LOSSES, STEP, synthetic_problem
from fairseq_sparsemixer.fidelity.measure import CHUNK
from fairseq_sparsemixer.fidelity.methods import METHODS, select_methods
from fairseq_sparsemixer.fidelity.plots import plot_study
from fairseq_sparsemixer.fidelity.problem import Problem
from fairseq_sparsemixer.fidelity.report import print_study
from fairseq_sparsemixer.fidelity.study import study
from fairseq_sparsemixer.ranges import TOO_LARGE, Rule, broken_rule

HELP = "compare every gradient estimator with the exact router gradient"
SYNTHETIC_TOKENS, TRAINED_TOKENS = 16, 64
SIZE = Rule(lambda x: x >= 1, "be at least 1", whole=True)  # check_size bounds them together
NUMBERS = {  # of the flags, what they may be
    "tokens": SIZE,
    "num_experts": Rule(lambda x: x >= 2, "be at least 2", whole=True),
    "model_dim": SIZE,
    "draws": Rule(lambda x: 2 <= x < TOO_LARGE, "be at least 2", whole=True),
    "step": Rule(lambda x: 1e-6 <= x <= 1e6, "lie between 1e-06 and 1e+06, where float64 tells losses apart"),
    "seed": Rule(lambda x: -(2**63) <= x < 2**63, "fit in 64 bits", whole=True),
}
OUTCOMES = 1 + max(len(estimator.quadrature) for estimator in ESTIMATORS.values())  # of an expert, enumerated
LARGEST = 2**29  # numbers of 8 bytes
SYNTHETIC = {"loss": "cross-entropy", "num_experts": 8, "model_dim": 16, "step": STEP}  # flags that a checkpoint answers itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The problem, what to measure, and where to write it."""
    problem = parser.add_argument_group("a synthetic problem")
    problem.add_argument("--loss", choices=list(LOSSES), help="downstream loss g (default: cross-entropy)")
    problem.add_argument("--num-experts", type=int, metavar="E", help="experts (default: 8)")
    problem.add_argument("--model-dim", type=int, metavar="M", help="width of a token (default: 16)")
    problem.add_argument("--step", type=float, help=f"scale of the experts' outputs (default: {STEP:g})")
    trained = parser.add_argument_group("a layer of a trained model")
    trained.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of transformer_moe")
    trained.add_argument("--text", metavar="FILE", help="source sentences, in subwords as the model was trained on")
    trained.add_argument("--target", metavar="FILE", help="their translations, line by line")
    trained.add_argument("--layer", metavar="NAME", help="MoE layer, such as encoder.layers.0 (default: the first)")
    trained.add_argument("--data-bin", metavar="DIR", help="where the dictionaries are (default: where the model was trained)")
    measured = parser.add_argument_group("what to measure")
    measured.add_argument(
        "--tokens", type=int, metavar="S", help=f"tokens (default: {SYNTHETIC_TOKENS}; with --checkpoint {TRAINED_TOKENS})"
    )
    measured.add_argument(
        "--jitter-eps",
        type=float,
        metavar="R",
        help="mask experts as SparseMixer does; inf: none (default: none; with --checkpoint as it was trained)",
    )
    names = ",".join(dict.fromkeys(method.name for method in METHODS))
    measured.add_argument("--estimators", metavar="NAMES", help=f"comma-separated, of {names} (default: all)")
    measured.add_argument("--draws", type=int, metavar="N", help="draws of every token (default: 16384; with --checkpoint none)")
    measured.add_argument("--expectation", action="store_true", help="exact expectations instead of draws")
    measured.add_argument("--seed", type=int, default=1, help="of the synthetic problem and the draws (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--png", metavar="FILE", help="write a picture")


def run(options: argparse.Namespace) -> None:
    """Measure, print, write. Raises ConfigurationError for flags that cannot be used."""
    try:
        check(options)
        require_json(options.json, [path for path in (options.checkpoint, options.text, options.target) if path])
        require_json(options.png, [options.json] if options.json else [], flag="--png")
        methods = select_methods(options.estimators.split(",") if options.estimators else None)
        problem = build_problem(options)
    except ValueError as error:
        raise error if isinstance(error, ConfigurationError) else ConfigurationError(str(error)) from None
    draws = options.draws
    if draws is None and not options.expectation and not options.checkpoint:
        draws = 16384
    check_gradient(problem, options)
    found = study(problem, methods, draws, options.seed, orders=not options.checkpoint)
    print_study(found, Console())
    if options.json:
        write_json(options.json, {**found.as_dict(), "conclusions": conclusions(found)})
    if options.png:
        plot_study(found, options.png)


def check(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for values out of range, and for flags that do not go together."""
    for name, rule in NUMBERS.items():
        value = getattr(options, name)
        sentence = "" if value is None else broken_rule(f"--{name.replace('_', '-')}", value, rule)
        if sentence:
            raise ConfigurationError(sentence)
    if options.jitter_eps is not None and not options.jitter_eps > 0:
        raise ConfigurationError(f"--jitter-eps {options.jitter_eps:g} would mask all experts but one; give inf to mask none")
    if options.expectation and options.draws is not None:
        raise ConfigurationError(f"--expectation draws nothing; leave out --draws {options.draws}, or --expectation")
    if options.checkpoint:
        given = [name for name in SYNTHETIC if getattr(options, name) is not None]
        if given:
            flag = given[0].replace("_", "-")
            raise ConfigurationError(f"--{flag} describes a synthetic problem; leave it out, or leave out --checkpoint")
        if not (options.text and options.target):
            raise ConfigurationError("--checkpoint needs sentences to run on: give --text FILE and --target FILE")
    else:
        for name in ("text", "target", "layer", "data_bin"):
            if getattr(options, name):
                raise ConfigurationError(f"--{name.replace('_', '-')} {getattr(options, name)} needs --checkpoint FILE")


def check_size(tokens: int, num_experts: int, model_dim: int) -> None:
    """Raise ConfigurationError for a problem whose tensors no machine holds: [S, E, M], one S by E for each outcome or draw."""
    numbers = tokens * num_experts * max(model_dim, CHUNK, num_experts * OUTCOMES)
    if numbers > LARGEST:
        raise ConfigurationError(
            f"--tokens {tokens} with --num-experts {num_experts} and --model-dim {model_dim} takes {numbers:,} numbers at once;"
            f" choose smaller ones, for {LARGEST:,} at most"
        )


def check_gradient(problem: Problem, options: argparse.Namespace) -> None:
    """Raise ConfigurationError where the exact gradient, by whose square figures are divided, is nothing to compare with."""
    length = exact_gradient(problem).full.norm().item()
    if not 1e-140 < length < 1e140:
        remedy = "--layer, --text or --jitter-eps" if options.checkpoint else "--step or --jitter-eps"
        raise ConfigurationError(
            f"the router's exact gradient has a length of {length:g}, and nothing compares; give another {remedy}"
        )


def build_problem(options: argparse.Namespace) -> Problem:
    """The problem the flags describe. Raises ConfigurationError or ValueError."""
    if not options.checkpoint:
        given = {name: getattr(options, name) for name in SYNTHETIC if getattr(options, name) is not None}
        tokens, jitter_eps, shape = options.tokens or SYNTHETIC_TOKENS, options.jitter_eps, {**SYNTHETIC, **given}
        check_size(tokens, shape["num_experts"], shape["model_dim"])
        return synthetic_problem(tokens=tokens, jitter_eps=jitter_eps, seed=options.seed, **shape)
    from fairseq_sparsemixer.fidelity.trained import trained_problem  # needs fairseq

    return trained_problem(
        options.checkpoint,
        options.text,
        options.target,
        layer=options.layer,
        data_bin=options.data_bin,
        max_tokens=options.tokens or TRAINED_TOKENS,
        jitter_eps=options.jitter_eps,
    )
