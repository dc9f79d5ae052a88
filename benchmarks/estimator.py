"""The overhead of SparseMixer's estimator over Switch's: in a step of one layer, and in a training step of a translation model.

example: python -m benchmarks.estimator
"""

import argparse
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Sequence

import torch

from benchmarks import contenders, measuring
from fairseq_sparsemixer.tools.tables import markdown_table

ROUTERS = ("switch", "sparsemixer")


def layer_steps(options: argparse.Namespace) -> Dict[str, Callable[[], None]]:
    """Forward and backward of one layer with each router."""
    shape = contenders.Shape(options.tokens, options.experts, 1, *options.dims)
    x = torch.randn(shape.tokens, shape.model_dim, requires_grad=True)
    upstream = torch.randn_like(x)
    steps = {}
    for router in ROUTERS:
        contender = contenders.ours(shape, router)
        steps[router] = lambda contender=contender: contender.step(x, upstream)
    return steps


def model_steps(options: argparse.Namespace) -> Dict[str, Callable[[], None]]:
    """Forward, loss, backward and Adam update of a whole model with each router."""
    from fairseq_sparsemixer.criterions.moe_cross_entropy import MoECrossEntropyCriterion, MoECrossEntropyCriterionConfig

    from benchmarks import models

    task = models.translation_task(options.words)
    sample = models.random_batch(task, options.sentences, options.length)
    steps = {}
    for router in ROUTERS:
        model = models.build_model(task, options.architecture, router, options.experts)
        criterion = MoECrossEntropyCriterion.build_criterion(MoECrossEntropyCriterionConfig(sentence_avg=False), task)
        optimizer = torch.optim.Adam(model.parameters(), foreach=True)

        def step(model=model, criterion=criterion, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            criterion(model, sample)[0].backward()
            optimizer.step()

        steps[router] = step
    return steps


def compare(steps: Dict[str, Callable[[], None]], rounds: int) -> Dict[str, Any]:
    """Time both steps interleaved; `overhead` is the median over rounds of sparsemixer's time / switch's time - 1."""
    timings = measuring.time_interleaved(steps, rounds)
    return {
        **{f"{name}_ms": round(1e3 * timing.median, 2) for name, timing in timings.items()},
        "spread": round(max(timing.spread for timing in timings.values()), 3),
        "overhead": round(measuring.ratio(timings["sparsemixer"], timings["switch"]) - 1, 4),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=8, help="number of experts E")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens S of the single layer")
    parser.add_argument("--dims", type=int, nargs=2, default=(512, 2048), metavar=("M", "H"), help="widths of the single layer")
    parser.add_argument("--architecture", default="iwslt", help="size of the model, transformer_moe_*")
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--length", type=int, default=30)
    parser.add_argument("--words", type=int, default=10000, help="dictionary size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="folder for estimator.json")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = build_parser().parse_args(arguments)
    torch.manual_seed(0)
    result = {"layer": compare(layer_steps(options), options.rounds), "model": compare(model_steps(options), options.rounds)}
    print(
        markdown_table(
            ["step of", "switch ms", "sparsemixer ms", "spread", "overhead"],
            [
                [name, case["switch_ms"], case["sparsemixer_ms"], f"{case['spread']:.0%}", f"{case['overhead']:+.1%}"]
                for name, case in result.items()
            ],
        )
    )
    if options.out:
        measuring.write_json(options.out / "estimator.json", result)


if __name__ == "__main__":
    main()
