"""Memory and time of a training step with --checkpoint-experts, against keeping everything, on one or more CPU ranks.

example: python -m benchmarks.recompute --ranks 2
A stack of MoE layers with residual connections, forward and backward. Each rank has its own tokens and a shard of the experts.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, Dict

import torch
from torch import multiprocessing, nn
from torch import distributed as dist
from torch.utils.checkpoint import checkpoint

from benchmarks import measuring
from fairseq_sparsemixer.moe.layer import build_moe_layer, moe_layers, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group
from fairseq_sparsemixer.tools.tables import markdown_table

MODES = ("plain", "experts", "layers")  # what is run again: nothing, --checkpoint-experts, --checkpoint-activations


class Stack(nn.Module):
    """MoE layers with residual connections; `mode` is one of MODES."""

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        sizes = options.model_dim, options.hidden_dim, options.experts
        self.layers = nn.ModuleList(build_moe_layer("topk", *sizes, activation=options.activation) for _ in range(options.layers))
        self.mode = MODES[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [S, M] -> [S, M]."""
        for layer in self.layers:
            layer.experts.recompute = self.mode == "experts"
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.mode == "layers" else layer(x))
        return x


def measure(rank: int, options: argparse.Namespace, meeting: str, answers: Any) -> None:
    """On one rank: peak bytes beyond the weights and their gradients, and seconds of a step, for each of MODES."""
    torch.set_num_threads(1)
    if options.ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)
    torch.manual_seed(1)
    stack = Stack(options)
    if options.ranks > 1:
        shard_experts(stack, form_expert_group(options.ranks))
    torch.manual_seed(rank)
    x = torch.randn(options.tokens, options.model_dim)

    def step(mode: str) -> None:
        stack.mode = mode
        for layer in moe_layers(stack):
            layer.routing = None  # of the step before
        stack(x).square().mean().backward()

    for mode in (*MODES, *MODES):  # makes the gradients, and the buffers of their sums
        step(mode)
    memory = {mode: measuring.peak_memory(lambda mode=mode: step(mode)) for mode in MODES}
    times = measuring.time_interleaved({mode: lambda mode=mode: step(mode) for mode in MODES}, options.rounds)
    ratios = {mode: measuring.ratio(times[mode], times[MODES[0]]) for mode in MODES}
    answers.put({mode: {"bytes": memory[mode], "seconds": times[mode].median, "time": ratios[mode]} for mode in MODES})
    if options.ranks > 1:
        dist.barrier()


def worst(answers: Any, ranks: int) -> Dict[str, Dict[str, float]]:
    """The largest figure of any rank."""
    each = [answers.get() for _ in range(ranks)]
    return {mode: {key: max(one[mode][key] or 0 for one in each) for key in each[0][mode]} for mode in MODES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(ranks=2, layers=6, experts=8, tokens=2048, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")  # of the ranks: what they free goes back to the system
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (options, f"{folder}/meeting", answers), nprocs=options.ranks)
    figures = worst(answers, options.ranks)
    rows = [[mode, f"{own['bytes'] / 2**20:.0f}", f"{own['seconds']:.2f}", f"{own['time']:.2f}"] for mode, own in figures.items()]
    print(markdown_table(["run again", "peak MiB", "seconds", "time"], rows))
    if options.json:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        measuring.write_json(options.json, {"options": given, "figures": figures})


if __name__ == "__main__":
    main()
