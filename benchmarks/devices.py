"""Devices as rooflines: datasheet figures from devices.csv, and the time that kernels and exchanges take by them."""

import csv
from pathlib import Path
from typing import Dict, NamedTuple

from benchmarks.costs import Costs, Kernel

TABLE = Path(__file__).with_name("devices.csv")
# Assumed shares of the datasheet figures that good kernels reach.
OF_FLOPS, OF_MEMORY, OF_LINKS = 0.8, 0.9, 0.8
ORDERING = 17  # launches of small kernels that put rows into the order of two steps: tests/gpu/cases/case_layer.py
MESSAGE = 2e-6  # assumed seconds that a rank spends on each message between nodes, besides its bytes


class Device(NamedTuple):
    """One line of the table. capability: the major compute capability."""

    name: str
    capability: int
    memory_gb: float
    memory_tb_s: float
    bf16_tflops: float
    float32_tflops: float
    nvlink_gb_s: float
    infiniband_gb_s: float
    launch_us: float

    @property
    def launch(self) -> float:
        return self.launch_us * 1e-6

    def moving(self, count: float) -> float:
        """Seconds to read or write this many bytes of memory."""
        return count / (OF_MEMORY * self.memory_tb_s * 1e12)

    def computing(self, flops: float, float32: bool = False) -> float:
        """Seconds for this many FLOPs of matrix products in bfloat16, or in float32."""
        return flops / (OF_FLOPS * (self.float32_tflops if float32 else self.bf16_tflops) * 1e12)

    def over_nvlink(self, count: float) -> float:
        return count / (OF_LINKS * self.nvlink_gb_s * 1e9)

    def over_infiniband(self, count: float) -> float:
        return count / (OF_LINKS * self.infiniband_gb_s * 1e9)


class Times(NamedTuple):
    """Seconds of a layer's kernels: matrix products, other kernels, and launches of both."""

    products: float
    other: float
    launches: float

    @property
    def total(self) -> float:
        return sum(self)


def read_devices(path: Path = TABLE) -> Dict[str, Device]:
    """The devices of a table by name. Raises ValueError, naming the line, if one is incomplete or a figure is not positive."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    return {device.name: device for device in map(_device, rows)}


def _device(row: Dict[str, str]) -> Device:
    try:
        figures = [float(row[field]) for field in Device._fields[1:]]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{dict(row)} needs a number in each of {', '.join(Device._fields[1:])}") from None
    if not all(0 < figure < float("inf") for figure in figures):
        raise ValueError(f"{dict(row)} has a figure that is not positive and finite")
    return Device(row["name"], int(figures[0]), *figures[1:])


def kernel_seconds(kernel: Kernel, device: Device) -> float:
    """The roofline: a kernel is limited by its memory traffic or by its arithmetic. Without the launch."""
    return max(device.moving(kernel.bytes), device.computing(kernel.flops, kernel.float32))


def layer_times(costs: Costs, device: Device) -> Times:
    """The kernels one after the other, without all-to-alls and host waits."""
    products = sum(times * kernel_seconds(kernel, device) for kernel, times in costs.kernels if kernel.flops)
    other = sum(times * kernel_seconds(kernel, device) for kernel, times in costs.kernels if not kernel.flops)
    return Times(products, other, costs.launches * device.launch)


def exchange_seconds(costs: Costs, group: int, device: Device, domain: int) -> float:
    """The all-to-alls of a layer among `group` ranks, of which `domain` are joined by NVLink and the rest by InfiniBand.

    Both links work at once. domain 1: InfiniBand alone.
    """
    if group == 1:
        return 0.0
    near, far = min(domain, group) - 1, max(group - domain, 0)
    sent = sum(costs.sent) / group  # to each rank
    return max(device.over_nvlink(sent * near), device.over_infiniband(sent * far)) + len(costs.sent) * device.launch


class Steps(NamedTuple):
    """Seconds of a layer's all-to-alls without messages' own time, and the messages between nodes that a rank sends in them."""

    seconds: float
    messages: int

    @property
    def total(self) -> float:
        return self.seconds + self.messages * MESSAGE


def in_one_step(costs: Costs, group: int, device: Device, domain: int) -> Steps:
    """All-to-alls among all ranks: as exchange_seconds, with a message to each rank of another node."""
    return Steps(exchange_seconds(costs, group, device, domain), len(costs.sent) * (group - domain))


def in_two_steps(costs: Costs, group: int, device: Device, domain: int) -> Steps:
    """All-to-alls inside nodes of `domain` ranks, a copy, and all-to-alls between nodes, in turn; and the ordering."""
    nodes, sent = group // domain, sum(costs.sent)
    inside, between = sent * (domain - 1) / domain, sent * (nodes - 1) / nodes
    seconds = device.over_nvlink(inside) + device.moving(2 * sent) + device.over_infiniband(between)
    return Steps(seconds + (3 * len(costs.sent) + ORDERING) * device.launch, len(costs.sent) * (nodes - 1))
