"""Optimizer state and time of an update with --shard-expert-optimizer, against whole updates on each replica, on CPU ranks.

example: python -m benchmarks.optimizer_state --ranks 2
Each rank has two equal stacks of MoE layers and its own tokens, and updates them in turn with Adam: one whole, one by slices.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from benchmarks import measuring
from fairseq_sparsemixer.moe.gradients import reduce_expert_gradients, trained_experts
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group
from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices
from fairseq_sparsemixer.tools.tables import markdown_table

MODES = ("whole", "slices")


def measure(rank: int, options: argparse.Namespace, meeting: str, answers: Any) -> None:
    """On one rank, for each of MODES: bytes of the experts' optimizer state, seconds of an update and of its last part."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=options.ranks)
    ranks = form_expert_group(options.group_size)
    x = torch.randn(options.tokens, options.model_dim, generator=torch.Generator().manual_seed(rank))
    state: Dict[str, int] = {}
    steps: Dict[str, List[float]] = {mode: [] for mode in MODES}

    def updates(mode: str) -> Callable[[], None]:
        torch.manual_seed(1)
        sizes = options.model_dim, options.hidden_dim, options.experts
        model = nn.Sequential(*(build_moe_layer("topk", *sizes) for _ in range(options.layers)))
        shard_experts(model, ranks)
        experts = trained_experts(model)
        optimizer = torch.optim.Adam(experts, lr=1e-4)
        slices = ReplicaSlices(experts, ranks)

        def update() -> None:
            model(x).square().mean().backward()
            reduce_expert_gradients(model, ranks)
            start = time.perf_counter()
            with slices.updating() if mode == "slices" else nullcontext():
                optimizer.step()
            steps[mode].append(time.perf_counter() - start)
            model.zero_grad()
            moments = [value for entry in optimizer.state.values() for value in entry.values() if value.dim()]
            state[mode] = sum(value.numel() * value.element_size() for value in moments)

        return update

    times = measuring.time_interleaved({mode: updates(mode) for mode in MODES}, options.rounds, warmup=2)
    last = {mode: median(steps[mode][-options.rounds :]) for mode in MODES}
    answers.put({mode: {"bytes": state[mode], "seconds": times[mode].median, "step": last[mode]} for mode in MODES})
    answers.put({"ratio": measuring.ratio(times["slices"], times["whole"])})
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(ranks=2, group_size=1, layers=4, experts=8, tokens=1024, rounds=15).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    answers = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (options, f"{folder}/meeting", answers), nprocs=options.ranks)
    each = [answers.get() for _ in range(2 * options.ranks)]
    ratios = [answer["ratio"] for answer in each if "ratio" in answer]
    each = [answer for answer in each if "ratio" not in answer]
    figures = {mode: {key: max(one[mode][key] for one in each) for key in each[0][mode]} for mode in MODES}
    rows = [
        [mode, f"{own['bytes']:,}", f"{1000 * own['seconds']:.0f}", f"{1000 * own['step']:.0f}"] for mode, own in figures.items()
    ]
    print(markdown_table(["updates", "bytes of state a rank", "ms an update", "of it optimizer and exchange"], rows))
    print(f"slices / whole, median of {options.rounds} rounds: " + ", ".join(f"{ratio:.2f}" for ratio in ratios))
    if options.json:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        measuring.write_json(options.json, {"options": given, "figures": figures, "ratios": ratios})


if __name__ == "__main__":
    main()
