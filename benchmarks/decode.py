"""Beam search with and without experts in the same run: generated tokens per second. Random weights, fairseq's generator.

example: python -m benchmarks.decode --experts 8 --batch 1 64
"""

import argparse
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

import torch
from fairseq.sequence_generator import SequenceGenerator

from benchmarks import measuring, models
from fairseq_sparsemixer.tools.tables import markdown_table


def measure(options: argparse.Namespace, batch: int) -> Dict[str, Any]:
    """Time both models at one batch size."""
    torch.manual_seed(0)
    task = models.translation_task(options.words)
    sample = models.random_batch(task, batch, options.length)
    steps = {}
    for router in ("dense", options.router):
        model = models.build_model(task, options.architecture, router, options.experts).eval()
        generator = SequenceGenerator(
            [model], task.target_dictionary, beam_size=options.beam,
            max_len_a=0, max_len_b=options.length, min_len=options.length,  # equal work for both models
        )  # fmt: skip
        steps[router] = lambda generator=generator: generator.generate([], sample)
    timings = measuring.time_interleaved(steps, options.rounds)
    return {
        "batch": batch,
        "tokens_a_second": {name: round(batch * options.length / timing.median, 1) for name, timing in timings.items()},
        "spread": {name: round(timing.spread, 3) for name, timing in timings.items()},
        "slower_than_dense": round(measuring.ratio(timings[options.router], timings["dense"]), 3),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=models.ARCHITECTURES, default="base", help="size of transformer_moe")
    parser.add_argument("--router", default="sparsemixer")
    parser.add_argument("--experts", type=int, default=8, help="number of experts E")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="sentences per batch")
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--length", type=int, default=20, help="words per sentence, source and target")
    parser.add_argument("--words", type=int, default=10000, help="dictionary size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for decode.json")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = build_parser().parse_args(arguments)
    cases = [measure(options, batch) for batch in options.batch]
    print(
        markdown_table(
            ["batch", "dense tokens/s", f"{options.router} tokens/s", "x slower", "spread"],
            [
                [case["batch"], *case["tokens_a_second"].values(), case["slower_than_dense"], max(case["spread"].values())]
                for case in cases
            ],
        )
    )
    if options.out:
        settings = {name: getattr(options, name) for name in ("architecture", "router", "experts", "beam", "length", "words")}
        measuring.write_json(options.out / "decode.json", {"settings": settings, "cases": cases})


if __name__ == "__main__":
    main()
