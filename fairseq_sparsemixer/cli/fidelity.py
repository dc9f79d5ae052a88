"""Measure how close each gradient estimator comes to the exact gradient of the router.

All experts are enumerated for every token in float64, which gives the exact gradient of E_D[g(pi_D f_D)] in two terms:
choice (which expert is chosen; Switch drops it) and scale (how the chosen expert is scaled). Each estimator is compared
with the term it aims at and with the full gradient, over many draws or, with --expectation, without sampling noise.

examples:
  fairseq-sparsemixer fidelity
  fairseq-sparsemixer fidelity --loss quadratic --expectation
  fairseq-sparsemixer fidelity --loss cubic --num-experts 16 --jitter-eps 0.1 --json fidelity.json --png fidelity.png
  fairseq-sparsemixer fidelity --checkpoint checkpoint_best.pt --text val.bpe.en --target val.bpe.de --layer encoder.layers.0
"""

import argparse
from pathlib import Path
from typing import Dict, Union

from rich.console import Console

from fairseq_sparsemixer.cli.json_file import as_json, require_json
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_all

# as in tools/fidelity, which loads torch
LOSSES = ("cross-entropy", "quadratic", "cubic")
METHODS = "switch-argmax,switch,euler,midpoint,heun3,inf,reinforce,reinforce-baseline,default_moe,dense_st"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The problem, what to measure, and where to write it."""
    problem = parser.add_argument_group("a synthetic problem")
    problem.add_argument("--loss", choices=LOSSES, help="downstream loss g (default: cross-entropy)")
    problem.add_argument("--num-experts", type=int, metavar="E", help="number of experts (default: 8)")
    problem.add_argument("--model-dim", type=int, metavar="M", help="width of a token (default: 16)")
    problem.add_argument("--step", type=float, help="scale of the experts' outputs (default: 2)")
    trained = parser.add_argument_group("a layer of a trained model")
    trained.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of transformer_moe")
    trained.add_argument("--text", metavar="FILE", help="source sentences, in the model's subwords")
    trained.add_argument("--target", metavar="FILE", help="their translations, one per line")
    trained.add_argument("--layer", metavar="NAME", help="MoE layer, such as encoder.layers.0 (default: the first)")
    trained.add_argument("--data-bin", metavar="DIR", help="folder of the dictionaries (default: as in training)")
    measured = parser.add_argument_group("what to measure")
    measured.add_argument("--tokens", type=int, metavar="S", help="number of tokens (default: 16; with --checkpoint 64)")
    measured.add_argument(
        "--jitter-eps",
        type=float,
        metavar="R",
        help="mask experts as SparseMixer does; inf: no mask (default: no mask; with --checkpoint, as in training)",
    )
    measured.add_argument("--estimators", metavar="NAMES", help=f"comma-separated, of {METHODS} (default: all)")
    measured.add_argument("--draws", type=int, metavar="N", help="draws per token (default: 16384; with --checkpoint none)")
    measured.add_argument("--expectation", action="store_true", help="compute exact expectations instead of drawing")
    measured.add_argument("--seed", type=int, help="seed of the synthetic problem and the draws (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument("--png", metavar="FILE", help="also write a plot to this file")


def run(options: argparse.Namespace) -> None:
    """Measure, print, write. Raises ConfigurationError for unusable flags."""
    from fairseq_sparsemixer.tools.fidelity.conclusions import conclusions
    from fairseq_sparsemixer.tools.fidelity.methods import select_methods
    from fairseq_sparsemixer.tools.fidelity.plots import draw_study
    from fairseq_sparsemixer.tools.fidelity.report import print_study
    from fairseq_sparsemixer.tools.fidelity.requested import build_problem, check, check_gradient
    from fairseq_sparsemixer.tools.fidelity.study import study
    from fairseq_sparsemixer.tools.plotting import drawn

    try:
        check(options)
        options.seed = 1 if options.seed is None else options.seed
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
    contents: Dict[Path, Union[str, bytes]] = {}
    if options.json:
        contents[Path(options.json)] = as_json({**found.as_dict(), "conclusions": conclusions(found)})
    if options.png:
        contents[Path(options.png)] = drawn(draw_study(found))
    try:
        write_all(contents)
    except OSError as error:
        flag = "--json" if options.json and error.filename == str(Path(options.json)) else "--png"
        raise ConfigurationError(f"{flag} {error.filename} cannot be written ({error.strerror}); give another path") from None
