"""One MoE layer, forward and backward: time, memory and host synchronisations compared with a dense layer and other MoE layers.

examples:
  python -m benchmarks.layer                                # a minute: S = 1k and 4k
  python -m benchmarks.layer --preset growth --out results  # minutes: S from 256 to 16k, E from 4 to 256
  python -m benchmarks.layer --preset full --out results    # hours: the whole grid, within --memory-gb and --seconds
  python -m benchmarks.layer --tokens 4096 --experts 8 64 --peer sparsemixer=CHECKOUT --peer fairseq-moe=CHECKOUT
"""

import argparse
import gc
import itertools
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

from benchmarks import contenders, measuring
from benchmarks.contenders import Contender, NotRunnable, Shape
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.tables import markdown_table

PRESETS: Dict[str, Dict[str, Any]] = {
    "quick": {"tokens": [1024, 4096], "experts": [8, 32, 64], "dims": [(512, 2048)], "top_k": [1], "rounds": 5},
    "growth": {
        "tokens": [256, 1024, 4096, 16384],
        "experts": [4, 8, 16, 64, 256],
        "dims": [(512, 2048)],
        "top_k": [1],
        "rounds": 5,
    },
    "full": {
        "tokens": [256, 1024, 4096, 16384, 65536],
        "experts": [4, 8, 16, 64, 256],
        "dims": [(512, 2048), (1024, 4096)],
        "top_k": [1, 2],
        "rounds": 5,
    },
}
SECONDS_A_FLOP = 1e-11  # of one or two CPU cores, to skip cases that would take minutes; an overestimate for GPUs


def build(name: str, builder: Callable[[Shape], Contender], shape: Shape, limits: argparse.Namespace) -> Contender:
    """Build a contender. Raises NotRunnable, also if it would need more than --memory-gb."""
    experts = 1 if name == "dense" else shape.experts
    needed = 2 * shape.weight_bytes(experts) + 24 * shape.tokens * shape.top_k * shape.hidden_dim
    if name in ("fairscale", "fairseq-moe"):
        needed += 40 * shape.tokens**2 * shape.top_k  # several tensors S x E x C, where C is about k S / E
    if needed > limits.memory_gb * 2**30:
        raise NotRunnable(f"about {needed / 2**30:.0f} GB, more than --memory-gb {limits.memory_gb:g}")
    return builder(shape)


def measure(shape: Shape, builders: Dict[str, Callable[[Shape], Contender]], limits: argparse.Namespace) -> Dict[str, Any]:
    """Measure all contenders on one shape; ratios to the dense layer are taken within rounds."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if limits.bf16 else torch.float32
    x = torch.randn(shape.tokens, shape.model_dim, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(x)
    built: Dict[str, Contender] = {}
    absent: Dict[str, str] = {}
    for name, builder in builders.items():
        try:
            contender = build(name, builder, shape, limits)
            contender.module.to(device, dtype)
            contender.step(x, upstream)
            built[name] = contender
        except (NotRunnable, NotImplementedError) as error:  # torch raises the latter for operations a device lacks
            absent[name] = str(error).splitlines()[0]
    timings = measuring.time_interleaved({name: _step(c, x, upstream) for name, c in built.items()}, limits.rounds)
    figures = {}
    for name, contender in built.items():
        step = _step(contender, x, upstream)
        for other in built.values():
            other.module.zero_grad(set_to_none=True)
        contender.forget_memory()
        peak = measuring.peak_memory(step)
        with measuring.HostSynchronisations() as syncs:
            contender.forward(x)
        figures[name] = {
            "ms": round(1e3 * timings[name].median, 2),
            "fastest_ms": round(1e3 * min(timings[name].seconds), 2),
            "spread": round(timings[name].spread, 3),
            "to_dense": round(measuring.ratio(timings[name], timings["dense"]), 3),
            "peak_mb": None if peak is None else round(peak / 2**20, 1),
            "host_syncs": syncs.count,
        }
    built.clear()
    gc.collect()
    return {"shape": shape._asdict(), "layers": figures, "not_run": absent}


def _step(contender: Contender, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    return lambda: contender.step(x, upstream)


def growth(cases: List[Dict[str, Any]], layer: str, variable: str, figure: str = "ms") -> List[Dict[str, Any]]:
    """The growth exponent of a figure in one dimension of the shape, for each choice of the others with at least 3 sizes.

    For k, two sizes are enough, because the presets have no more.
    """
    fits: Dict[tuple, List[Dict[str, Any]]] = {}
    for case in cases:
        if layer in case["layers"] and case["layers"][layer][figure]:
            fixed = tuple(value for name, value in case["shape"].items() if name != variable)
            fits.setdefault(fixed, []).append(case)
    names = [name for name in Shape._fields if name != variable]
    return [
        {
            **dict(zip(names, fixed)),
            "exponent": round(
                measuring.growth_exponent(
                    [case["shape"][variable] for case in group], [case["layers"][layer][figure] for case in group]
                ),
                3,
            ),
        }
        for fixed, group in fits.items()
        if len({case["shape"][variable] for case in group}) >= (2 if variable == "top_k" else 3)
    ]


def report(cases: List[Dict[str, Any]]) -> str:
    """A Markdown table with one line per layer and shape."""
    rows = [
        [*case["shape"].values(), name, f["ms"], f"{100 * f['spread']:.0f} %", f["to_dense"], f["peak_mb"], f["host_syncs"]]
        for case in cases
        for name, f in case["layers"].items()
    ]
    header = ["S", "E", "k", "M", "H", "layer", "ms", "spread", "x dense", "peak MB", "host syncs"]
    return markdown_table(header, rows)


def plot(cases: List[Dict[str, Any]], path: Path) -> None:
    """Plot the time relative to dense for each shape, one bar per layer."""
    from fairseq_sparsemixer.tools.plotting import save, styled  # loads matplotlib, needed only here

    save(styled(_draw)(cases), path)


def _draw(cases: List[Dict[str, Any]]) -> Any:
    from fairseq_sparsemixer.tools.plotting import new_figure

    names = [name for name in dict.fromkeys(name for case in cases for name in case["layers"]) if name != "dense"]
    figure = new_figure(max(6, 0.45 * len(cases) * max(len(names), 1)), 4)
    axes = figure.subplots()
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        places = [place + index * width for place, case in enumerate(cases) if name in case["layers"]]
        axes.bar(places, [case["layers"][name]["to_dense"] for case in cases if name in case["layers"]], width, label=name)
    axes.axhline(1, color="black", linewidth=1, label="dense")
    labels = ["S={tokens} E={experts}\nk={top_k} M={model_dim}".format(**case["shape"]) for case in cases]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(cases))], labels, fontsize=7)
    axes.set_ylabel("time of forward and backward, relative to dense")
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


def parse_peer(text: str) -> tuple:
    """Parse NAME=PATH. Raises ArgumentTypeError for anything else."""
    name, _, path = text.partition("=")
    if name not in contenders.PEERS or not path:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=PATH with NAME one of {', '.join(contenders.PEERS)}")
    return name, Path(path).expanduser()


def parse_dims(text: str) -> tuple:
    """Parse MxH. Raises ValueError, which argparse reports, for anything else."""
    model_dim, hidden_dim = text.split("x")
    return int(model_dim), int(hidden_dim)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="shapes; the flags below override them")
    parser.add_argument("--tokens", type=int, nargs="+", help="numbers of tokens S")
    parser.add_argument("--experts", type=int, nargs="+", help="numbers of experts E")
    parser.add_argument("--top-k", type=int, nargs="+", help="experts per token k")
    parser.add_argument("--dims", type=parse_dims, nargs="+", metavar="MxH", help="model and hidden dimension, e.g. 512x2048")
    parser.add_argument("--rounds", type=int, help="repetitions; every layer runs once per round")
    parser.add_argument("--router", help="router of our layer (default: sparsemixer for k = 1, sparsemixer_v2 for more)")
    parser.add_argument("--peer", type=parse_peer, action="append", default=[], metavar="NAME=PATH",
                        help=f"another MoE layer from a checkout: {', '.join(contenders.PEERS)}")  # fmt: skip
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights and tokens (default: float32)")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="skip layers that would need more memory")
    parser.add_argument("--seconds", type=float, default=20.0, help="skip shapes with a dense step that would take longer")
    parser.add_argument("--out", type=Path, help="folder for layer.json, layer.md and layer.png")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    options = build_parser().parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    builders = {"dense": contenders.dense, "ours": lambda shape: contenders.ours(shape, options.router)}
    builders["fairscale"] = contenders.fairscale
    for name, path in options.peer:
        builders[name] = lambda shape, name=name, path=path: contenders.PEERS[name](shape, path)
    cases = []
    for (model_dim, hidden_dim), tokens, experts, top_k in itertools.product(
        options.dims, options.tokens, options.experts, options.top_k
    ):
        shape = Shape(tokens, experts, top_k, model_dim, hidden_dim)
        if shape.flops * SECONDS_A_FLOP > options.seconds or shape.weight_bytes() * 2 > options.memory_gb * 2**30:
            print(f"{shape} skipped: beyond --seconds {options.seconds:g} or --memory-gb {options.memory_gb:g}", flush=True)
            continue
        cases.append(measure(shape, builders, options))
        print(report(cases[-1:]).splitlines()[0] if len(cases) == 1 else "", end="\n" if len(cases) == 1 else "")
        print("\n".join(report(cases[-1:]).splitlines()[2:]), flush=True)
    fits = {name: growth(cases, "ours", name) for name in ("tokens", "experts", "top_k")}
    fits["peak_mb in tokens"] = growth(cases, "ours", "tokens", "peak_mb")
    for name, exponents in fits.items():
        print(f"growth in {name}: {exponents}")
    for name, reason in {name: reason for case in cases for name, reason in case["not_run"].items()}.items():
        print(f"{name}: cannot run here at some or all shapes ({reason})")
    if options.out:
        measuring.write_json(options.out / "layer.json", {"cases": cases, "growth": fits})
        write_whole(options.out / "layer.md", report(cases) + "\n")
        plot(cases, options.out / "layer.png")


if __name__ == "__main__":
    main()
