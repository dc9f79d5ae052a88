"""Costs and savings of expert parallelism: time per update, share of all-to-all, memory and traffic.

    python -m benchmarks.parallel --world-sizes 1 2 --out results

Every rank is a CPU process in a gloo group. The model is a stack of MoE layers; an update is forward, backward,
gradient reduction and an Adam step. The global batch is the same for every number of ranks.
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks import measuring
from fairseq_sparsemixer.moe.gradients import reduce_expert_gradients
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import CollectiveTimer, form_expert_group

MEBIBYTE = 2**20


def main() -> None:
    """Print a line for each number of ranks and group size; with --out, also write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--router", default="sparsemixer")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--hidden-dim", type=int, default=1024)
    parser.add_argument("--overlap", type=int, nargs="+", default=[1], help="numbers of chunks, as --moe-overlap")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per update, over all ranks")
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="threads per rank")
    parser.add_argument("--out", type=Path, help="folder for parallel.json")
    options = parser.parse_args()
    lines = []
    for world_size in options.world_sizes:
        for group_size in sorted({1, world_size}):
            for chunks in options.overlap if group_size > 1 else [1]:
                lines.append(measure(world_size, group_size, chunks, options))
                print_line(lines[-1], first=len(lines) == 1)
    fits = growth([line for line in lines if line["chunks"] == options.overlap[0] or line["group"] == 1])
    print(f"growth in W, as an exponent, experts sharded over all ranks: {fits}")
    if options.out:
        measuring.write_json(options.out / "parallel.json", {"results": lines, "growth": fits})


def measure(world_size: int, group_size: int, chunks: int, options: argparse.Namespace) -> Dict[str, Any]:
    """One line of the table: times are rank 0's medians, memory is the maximum over ranks."""
    with tempfile.TemporaryDirectory() as folder:
        queue = multiprocessing.get_context("spawn").SimpleQueue()
        arguments = (world_size, group_size, chunks, f"file://{folder}/meeting", options, queue)
        multiprocessing.spawn(run_rank, arguments, nprocs=world_size)
        by_rank: List[Dict[str, Any]] = [queue.get() for _ in range(world_size)]
    first = next(found for found in by_rank if found["rank"] == 0)
    return {
        "ranks": world_size,
        "group": group_size,
        "chunks": chunks,
        **{name: first[name] for name in ("ms_per_update", "ms_all_to_all", "expert_mib")},
        "peak_mib": max(found["peak_mib"] for found in by_rank),
        "bytes_sent_per_token": sum(found["sent"] for found in by_rank) / first["crossings"],
        "bytes_minimum": first["minimum"],
    }


def growth(lines: List[Dict[str, Any]]) -> Dict[str, float]:
    """Exponents in W of time per update, expert memory per rank and traffic per token, with experts sharded (G = W).

    -1 is ideal for the first two, 0 for the third. Empty for fewer than two numbers of ranks.
    """
    spread = [line for line in lines if line["group"] == line["ranks"]]
    if len(spread) < 2:
        return {}
    ranks = [line["ranks"] for line in spread]
    fits = {
        figure: measuring.growth_exponent(ranks, [line[figure] for line in spread]) for figure in ("ms_per_update", "expert_mib")
    }
    crossing = [line for line in spread if line["ranks"] > 1]
    if len(crossing) > 1:
        figure = "bytes_sent_per_token"
        fits[figure] = measuring.growth_exponent([line["ranks"] for line in crossing], [line[figure] for line in crossing])
    return {figure: round(exponent, 3) for figure, exponent in fits.items()}


def run_rank(
    rank: int, world_size: int, group_size: int, chunks: int, meeting: str, options: argparse.Namespace, queue: Any
) -> None:
    """Train, and put this rank's measurements into the queue."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    model = nn.Sequential(
        *(
            build_moe_layer(options.router, options.model_dim, options.hidden_dim, options.num_experts)
            for _ in range(options.layers)
        )
    )
    timer, ranks = CollectiveTimer(), None
    if group_size > 1:
        ranks = form_expert_group(group_size, timer=timer, chunks=chunks)
        shard_experts(model, ranks)
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    tokens = torch.randn(options.tokens // world_size, options.model_dim, requires_grad=True)  # as inside a model
    sent = count_sent_bytes()
    times, waits = [], []
    for _ in range(options.updates + 2):  # the first two are warm-up
        start = time.perf_counter()
        optimizer.zero_grad()
        wrapped(tokens).square().mean().backward()
        if ranks is not None:
            reduce_expert_gradients(model, ranks)
        optimizer.step()
        times.append(1000 * (time.perf_counter() - start))
        waits.append(timer.read().cpu)
    top_k = model[0].gate.top_k
    experts = [parameter for layer in model for parameter in layer.experts.parameters()]
    queue.put({
        "rank": rank,
        "ms_per_update": statistics.median(times[2:]),
        "ms_all_to_all": statistics.median(waits[2:]),
        "expert_mib": sum(parameter.numel() * parameter.element_size() for parameter in experts) / MEBIBYTE,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux reports KiB
        "sent": sum(sent),
        "crossings": options.tokens * options.layers * (options.updates + 2) * 4,  # to experts and back, forward and backward
        "minimum": top_k * options.model_dim * tokens.element_size(),
    })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def count_sent_bytes() -> List[int]:
    """Record the bytes passed to each later all-to-all of this process, including its own share and the row counts."""
    sent: List[int] = []
    original = dist.all_to_all_single

    def counting(output: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(rows.numel() * rows.element_size())
        return original(output, rows, *args, **kwargs)

    dist.all_to_all_single = counting
    return sent


def print_line(line: Dict[str, Any], first: bool) -> None:
    """Print one row, with the table's head before the first."""
    if first:
        print("W  G  N   ms/update  all-to-all share  expert MiB/rank  peak MiB/rank  bytes/token one way  minimum")
    share, minimum = line["ms_all_to_all"] / line["ms_per_update"], line["bytes_minimum"] if line["group"] > 1 else 0
    print(
        f"{line['ranks']:<2} {line['group']:<2} {line['chunks']:<2} {line['ms_per_update']:10.1f} {share:17.1%}"
        f" {line['expert_mib']:16.1f} {line['peak_mib']:14.0f} {line['bytes_sent_per_token']:20.1f} {minimum:8}"
    )


if __name__ == "__main__":
    main()
