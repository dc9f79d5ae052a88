"""A cost model of the MoE layer on GPUs: its kernels, counted without a GPU, on the rooflines of several devices.

Nothing is measured. A kernel takes max(bytes / bandwidth, FLOPs / peak) at a stated share of datasheet figures, plus a launch.
Times are multiples of the dense feed-forward network of equal active FLOPs, forward and backward, bfloat16.

examples:
  python -m benchmarks.roofline                         # under a minute
  python -m benchmarks.roofline --device A100 B200      # the grid for other devices
  python -m benchmarks.roofline --router switch --tokens 4096 --experts 8 --json roofline.json
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set

from benchmarks.cluster_plan import CONTEXT, LAYERS, NODE, RANKS, VOCABULARY, make_plan
from benchmarks.costs import Case, Costs, Kernel
from benchmarks.devices import (
    MESSAGE,
    OF_FLOPS,
    OF_LINKS,
    OF_MEMORY,
    TABLE,
    Device,
    exchange_seconds,
    in_one_step,
    in_two_steps,
    layer_times,
    read_devices,
)
from benchmarks.fake_cuda import shim
from fairseq_sparsemixer.files import write_whole
from fairseq_sparsemixer.tools.tables import NOTHING, markdown_table

ROOT = Path(__file__).resolve().parent.parent
GOAL_DEVICE, GOAL_TOKENS, GOAL_DIMS, GOAL_LAUNCHES = "H100", 16384, (1024, 4096), 35
GOALS = [(8, 1, 1, 1.15), (8, 2, 1, 1.15), (64, 1, 1, 1.45), (64, 1, 8, None)]  # E, k, G, multiple of dense
PLANS = [(64, 8), (64, 64), (256, 8), (256, 64)]  # E, G

Table = List[Dict[str, Any]]


class Model:
    """Counted costs, and the tables computed from them. Each table is a list of lines, each a dict of columns."""

    def __init__(self, options: argparse.Namespace, devices: Dict[str, Device]):
        self.options, self.devices = options, devices
        self.costs: Dict[Case, Costs] = {}
        self.missing: Set[Case] = set()

    def case(self, device: Device, tokens: int, experts: int, top_k: int, group: int = 1) -> Case:
        router = self.options.router or ("sparsemixer" if top_k == 1 else "sparsemixer_v2")
        model_dim, hidden_dim = self.options.dims
        return Case(router, tokens, experts, top_k, model_dim, hidden_dim, group, device.capability)

    def dense(self, case: Case) -> Case:
        """The dense layer of equal active FLOPs. Its kernels are the same on every device."""
        return case._replace(layer="dense", experts=1, group=1, capability=9)

    def __getitem__(self, case: Case) -> Costs:
        """The costs of a case; while collecting cases, those of nothing."""
        if case not in self.costs:
            self.missing.add(case)
        return self.costs.get(case, Costs([(Kernel("nothing", 1, 1, False), 1)], 0, [], 0))

    def multiple(self, case: Case, device: Device) -> float:
        """Time of the case's kernels over that of the dense layer."""
        return layer_times(self[case], device).total / layer_times(self[self.dense(case)], device).total

    def grid(self, device: Device) -> Table:
        """Multiples for all S and k by E and G, without all-to-alls."""
        lines = []
        for top_k in self.options.top_k:
            for tokens in self.options.tokens:
                line: Dict[str, Any] = {"k": top_k, "S": tokens}
                for experts in self.options.experts:
                    for group in (group for group in self.options.groups if experts % group == 0):
                        case = self.case(device, tokens, experts, top_k, group)
                        line[f"E={experts} G={group}"] = round(self.multiple(case, device), 2)
                lines.append(line)
        return lines

    def exchanges(self, device: Device) -> Table:
        """All-to-all times over the dense layer's, for the most experts, with all links of one kind."""
        lines = []
        experts = max(self.options.experts)
        groups = [group for group in self.options.groups if group > 1 and experts % group == 0]
        for top_k in self.options.top_k:
            for tokens in self.options.tokens if groups else []:
                line: Dict[str, Any] = {"k": top_k, "S": tokens}
                for group in groups:
                    case = self.case(device, tokens, experts, top_k, group)
                    unit = layer_times(self[self.dense(case)], device).total
                    for link, domain in (("NVLink", group), ("InfiniBand", 1)):
                        line[f"G={group} {link}"] = round(exchange_seconds(self[case], group, device, domain) / unit, 2)
                lines.append(line)
        return lines

    def steps(self, device: Device) -> Table:
        """All-to-alls of the largest group over several nodes, in one step and in two (--moe-hierarchical-exchange)."""
        lines = []
        experts = max(self.options.experts)
        groups = [group for group in self.options.groups if group > NODE and group % NODE == 0 and experts % group == 0]
        for top_k, tokens in itertools.product(self.options.top_k, self.options.tokens) if groups else []:
            group = max(groups)
            case = self.case(device, tokens, experts, top_k, group)
            one, two = (steps(self[case], group, device, NODE) for steps in (in_one_step, in_two_steps))
            equal = (two.seconds - one.seconds) / max(one.messages - two.messages, 1)
            lines.append({
                "k": top_k, "S": tokens, "G": group, "one step ms": round(1e3 * one.total, 2),
                "two steps ms": round(1e3 * two.total, 2), "ratio": round(two.total / max(one.total, 1e-12), 2),
                "equal at µs a message": round(1e6 * equal, 2),
            })  # fmt: skip
        return lines

    def by_device(self) -> Table:
        """Every device of the table with all experts on one GPU, at the goals' S or the largest below it."""
        tokens, lines = min(GOAL_TOKENS, max(self.options.tokens)), []  # launches hide the differences at small S
        for device in self.devices.values():
            for top_k in self.options.top_k:
                cases = {experts: self.case(device, tokens, experts, top_k) for experts in self.options.experts}
                dense = layer_times(self[self.dense(cases[self.options.experts[0]])], device).total
                line: Dict[str, Any] = {"device": device.name, "k": top_k, "S": tokens, "dense ms": round(1e3 * dense, 2)}
                line.update({f"E={experts}": round(self.multiple(case, device), 2) for experts, case in cases.items()})
                line.update({f"launches E={experts}": self[case].launches for experts, case in cases.items()})
                lines.append(line)
        return lines

    def goals(self, device: Device) -> Table:
        """The goals for this device beside what today's layer gives, and where its time goes, in multiples of dense."""
        lines = []
        for experts, top_k, group, goal in GOALS:
            case = self.case(device, GOAL_TOKENS, experts, top_k, group)
            times, unit = layer_times(self[case], device), layer_times(self[self.dense(case)], device).total
            spared = max(self[case].launches - GOAL_LAUNCHES, 0) * device.launch
            lines.append({
                "E": experts, "k": top_k, "G": group, "goal": goal, "model": round(times.total / unit, 2),
                "products": round(times.products / unit, 2), "other kernels": round(times.other / unit, 2),
                "launching": round(times.launches / unit, 2),
                f"with {GOAL_LAUNCHES} launches": round((times.total - spared) / unit, 2),
                "launches": self[case].launches, "waits": self[case].waits, "waits goal": int(group > 1),
            })  # fmt: skip
        return lines

    def plans(self, device: Device) -> Table:
        """Training on RANKS GPUs, with one expert per token."""
        lines = []
        for experts, group in PLANS:
            case = self.case(device, GOAL_TOKENS, experts, 1, group)
            plan = make_plan(case, self[self.dense(case)], self[case], device)
            parts = {f"{part} ms": round(1e3 * seconds, 1) for part, seconds in plan.seconds.items()}
            lines.append({
                "E": experts, "G": group, "parameters GB": round(plan.parameters / 1e9, 1),
                "activations GB": round(plan.activations / 1e9, 1), "update ms": round(sum(parts.values()), 1), **parts,
                "M tokens/s": round(plan.tokens / sum(plan.seconds.values()) / 1e6), "binds": plan.binds,
            })  # fmt: skip
        return lines

    def tables(self) -> Dict[str, Table]:
        """All tables by title. The first call notes the missing cases; after count_missing, the second has the figures."""
        chosen = [self.devices[name] for name in self.options.device]
        tables = {}
        for device in chosen:
            tables[f"{device.name}: multiples of dense, without all-to-all"] = self.grid(device)
            tables[f"{device.name}: all-to-all in multiples of dense, E={max(self.options.experts)}"] = self.exchanges(device)
            steps = self.steps(device)
            if steps:
                tables[f"{device.name}: all-to-alls of a layer over nodes of {NODE} GPUs, E={max(self.options.experts)}"] = steps
        tables["Devices, all experts on one GPU"] = self.by_device()
        if GOAL_DEVICE in self.options.device and tuple(self.options.dims) == GOAL_DIMS:
            tables[f"{GOAL_DEVICE}: goals and today's layer, S={GOAL_TOKENS}"] = self.goals(self.devices[GOAL_DEVICE])
        for device in chosen:
            title = f"{device.name}: {RANKS} GPUs, {LAYERS} layers with MoE in every second, S={GOAL_TOKENS} per GPU, k=1"
            tables[title] = self.plans(device)
        return tables

    def count_missing(self) -> None:
        """Count all missing cases in one process with the shim. Raises CalledProcessError."""
        cases = sorted(self.missing)
        with tempfile.TemporaryDirectory() as folder:
            command = shim.command(shim.build(Path(folder)), "benchmarks.layer_costs")
            done = subprocess.run(command, input=json.dumps(cases), stdout=subprocess.PIPE, check=True, cwd=ROOT, text=True)
        self.costs = {case: costs_from_json(fields) for case, fields in zip(cases, json.loads(done.stdout))}


def costs_from_json(fields: Dict[str, Any]) -> Costs:
    """The Costs that benchmarks.layer_costs wrote."""
    return Costs(**{**fields, "kernels": [(Kernel(*kernel), times) for *kernel, times in fields["kernels"]]})


def assumptions(devices: Dict[str, Device]) -> str:
    """What the figures rest on, for people who read them."""
    lines = [
        "A model, nothing measured: an estimate on the side of a lower bound. Kernels read and write memory once and reach",
        f"{OF_FLOPS:.0%} of datasheet FLOPs, {OF_MEMORY:.0%} of memory bandwidth and {OF_LINKS:.0%} of links. Experts get",
        "equally many tokens. Host waits cost nothing. Every launch is added in full, although a GPU can hide it behind a long",
        "kernel.",
        f"All-to-alls over nodes: {1e6 * MESSAGE:g} µs for each message of a rank to another node, an assumption; in two steps,",
        "first over NVLink inside nodes, then over InfiniBand between them.",
        f"In plans, nothing overlaps: nodes of {NODE} GPUs, vocabulary {VOCABULARY}, context {CONTEXT}, bfloat16, Adam.",
        "",
        "Devices: datasheet figures, except for the launch time, which is an assumption.",
    ]
    return "\n".join(lines) + "\n\n" + as_markdown([device._asdict() for device in devices.values()])


def as_markdown(table: Table) -> str:
    """A Markdown table; a dash where a line has no such column."""
    columns = list(dict.fromkeys(column for line in table for column in line))
    rows = [[NOTHING if line.get(column) is None else line[column] for column in columns] for line in table]
    return markdown_table(columns, rows)


def parse_dims(text: str) -> tuple:
    """Parse MxH. Raises ValueError, which argparse reports, for anything else."""
    model_dim, hidden_dim = text.split("x")
    return int(model_dim), int(hidden_dim)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", nargs="+", default=["H100"], help="devices for the grid, the goals and the plan")
    parser.add_argument("--devices", type=Path, default=TABLE, metavar="CSV", help="the table of devices")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens S of a rank")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 256], help="numbers of experts E")
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 8, 64], help="ranks G that share the experts")
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2], help="experts per token k")
    parser.add_argument("--dims", type=parse_dims, default=GOAL_DIMS, metavar="MxH", help="model and hidden dimension")
    parser.add_argument("--router", help="router (default: sparsemixer for k = 1, sparsemixer_v2 for more)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to FILE")
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> None:
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        devices = read_devices(options.devices)
    except (OSError, ValueError) as error:
        parser.error(f"--devices: {error}")
    unknown = set(options.device) - set(devices)
    if unknown:
        parser.error(f"--device {', '.join(sorted(unknown))} is not in {options.devices}; choose from {', '.join(devices)}")
    for tokens, experts in itertools.product(options.tokens, options.experts):
        if tokens % experts:
            parser.error(f"--tokens {tokens} is not a multiple of --experts {experts}; the model assumes a perfect balance")
    reason = shim.why_not()
    if reason:
        sys.exit(f"The kernels cannot be counted here: {reason}. The committed tables are in benchmarks/results/roofline.md.")
    model = Model(options, devices)
    model.tables()
    try:
        model.count_missing()
    except subprocess.CalledProcessError as error:
        sys.exit(f"The kernels cannot be counted here: {error.stderr or error}")
    tables = model.tables()
    print(assumptions(devices))
    for title, table in tables.items():
        print(f"\n### {title}\n\n{as_markdown(table)}")
    if options.json:
        result = {"assumptions": assumptions(devices).splitlines(), "torch": version("torch"), "tables": tables}
        write_whole(options.json, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
