"""Memory of `fairseq-sparsemixer reshard` and `prune`: converts a random checkpoint in processes that record their own memory.

Prints the size of the checkpoint and, per conversion, the peaks of the memory that the process owns (RssAnon) and of the file
pages it maps (RssFile; the system may drop these from memory at any time). Linux only.

example:
  python benchmarks/reshard_memory.py --layers 8 --json reshard_memory.json
"""

import argparse
import json
import multiprocessing
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict

import torch

from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.plugin.checkpoints.pruning import prune
from fairseq_sparsemixer.plugin.checkpoints.resharding import read_any, reshard


def prune_half(source: str, target: str) -> None:
    """Remove the first half of each layer's experts."""
    state = read_any(source)[0][0]
    layers = [f"encoder.layers.{index}" for index in range(state["args"].encoder_layers)]
    prune(source, target, {layer: list(range(state["args"].num_experts)) for layer in layers}, keep=0.5)


STEPS = (
    ("portable -> 4 files", "whole", "four", partial(reshard, size=4)),
    ("4 files -> 2 files", "four", "two", partial(reshard, size=2)),
    ("2 files -> portable", "two", "back", partial(reshard, size=1)),
    ("portable, half pruned", "whole", "half", prune_half),
    ("4 files, half pruned", "four", "quarter", prune_half),
)


def make_checkpoint(path: Path, layers: int, experts: int, model_dim: int) -> None:
    """Write a checkpoint with layers of experts model_dim -> 4 model_dim and Adam's two moments of each."""
    model, moments = {}, {}
    for index in range(layers):
        layer = f"encoder.layers.{index}.fc1.moe"
        model[f"{layer}.experts.weight_in"] = torch.randn(experts, model_dim, 4 * model_dim)
        model[f"{layer}.gate.projection.weight"] = torch.randn(experts, model_dim)
        moments[index] = {"exp_avg": torch.randn(experts, model_dim, 4 * model_dim)}
        moments[index]["exp_avg_sq"] = moments[index]["exp_avg"].square()
    torch.save(
        {
            "model": model,
            "args": argparse.Namespace(arch="transformer_moe", router="switch", num_experts=experts, encoder_layers=layers),
            "last_optimizer_state": {"state": moments, "param_groups": []},
            "expert_parallel": {"size": 1, "index": 0, "save": None, "optimizer": list(moments)},
        },
        path,
    )


def resident() -> Dict[str, int]:
    """Current RssAnon and RssFile of this process, in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}


def convert(source: Path, target: Path, action: Callable[..., Any], pipe) -> None:
    """Convert, and send the duration and the peaks beyond what the process held before."""
    before, peak, done = resident(), resident(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            now = resident()
            peak.update({name: max(peak[name], now[name]) for name in peak})
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    action(str(source), str(target))
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    pipe.send({"seconds": seconds, **{name: peak[name] - before[name] for name in peak}})


def main() -> None:
    """Parse the command line, run the conversions, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--model-dim", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    table = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = multiprocessing.Process(
            target=make_checkpoint, args=(folder / "whole.pt", options.layers, options.num_experts, options.model_dim)
        )
        maker.start()
        maker.join()
        size = (folder / "whole.pt").stat().st_size
        tensor = options.num_experts * 4 * options.model_dim**2 * 4
        print(f"checkpoint {size / 2**20:,.0f} MiB, largest tensor {tensor / 2**20:,.0f} MiB")
        for title, source, target, action in STEPS:
            ours, theirs = multiprocessing.Pipe()
            arguments = (folder / f"{source}.pt", folder / f"{target}.pt", action, theirs)
            process = multiprocessing.Process(target=convert, args=arguments)
            process.start()
            figures = ours.recv()
            process.join()
            table.append({"conversion": title, "checkpoint": size, "largest_tensor": tensor, **figures})
            print(
                f"{title:22} owned {figures['RssAnon'] / 2**20:8,.1f} MiB   mapped {figures['RssFile'] / 2**20:8,.1f} MiB"
                f"   {figures['seconds']:.1f} s"
            )
    if options.json:
        write_whole(options.json, json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
