"""A plan for training on many GPUs: memory per rank, time per update and what limits it, from counted costs of one layer.

The model is a decoder with MoE in every second layer. Feed-forward and MoE layers are counted; attention, the output layer,
gradient reduction and Adam are formulas. Nothing overlaps, except that both kinds of links work at once.
"""

from typing import Dict, NamedTuple

from benchmarks.costs import Case, Costs
from benchmarks.devices import Device, exchange_seconds, layer_times

RANKS, NODE = 512, 8  # GPUs in all, and those of a node joined by NVLink
LAYERS, VOCABULARY, CONTEXT = 24, 32768, 512
PARAMETER_BYTES = 20  # bfloat16 weight and gradient, float32 weight, gradient and two moments: fairseq's --bf16
UPDATE_BYTES = 40  # per parameter: gradient cast up, Adam reads four float32 and writes three, weight cast down


class Plan(NamedTuple):
    """Bytes of a rank, and seconds of an update of one batch per rank."""

    parameters: float
    activations: float
    seconds: Dict[str, float]  # by part
    tokens: int  # in an update of all ranks
    capacity: float  # bytes of the device's memory

    @property
    def binds(self) -> str:
        """The largest part of the time; memory, if the model does not fit."""
        if self.parameters + self.activations > self.capacity:
            return "memory"
        return max(self.seconds, key=lambda part: self.seconds[part])


def make_plan(case: Case, dense: Costs, moe: Costs, device: Device) -> Plan:
    """dense, moe: the costs of a feed-forward network, and of the case's MoE layer."""
    tokens, model_dim, hidden_dim, group = case.tokens, case.model_dim, case.hidden_dim, case.group
    network = 2 * model_dim * hidden_dim
    replicated = LAYERS * 4 * model_dim**2 + LAYERS / 2 * network + VOCABULARY * model_dim
    sharded = LAYERS / 2 * case.experts / group * network
    replicas = RANKS // group
    seconds = {
        "attention and output": LAYERS * attention_seconds(tokens, model_dim, device)
        + device.computing(6 * tokens * model_dim * VOCABULARY),
        "feed-forward": LAYERS / 2 * (layer_times(dense, device).total + layer_times(moe, device).total),
        "all-to-all": LAYERS / 2 * exchange_seconds(moe, group, device, NODE),
        "gradients": reduction_seconds(2 * replicated, RANKS, NODE, device)
        + reduction_seconds(2 * sharded, replicas, max(NODE // group, 1), device),
        "optimizer": device.moving(UPDATE_BYTES * (replicated + sharded)),
    }
    kept = LAYERS * 8 * tokens * model_dim * 2  # attention: two norms, q, k, v, its output, two residuals, in bfloat16
    activations = kept + LAYERS / 2 * (dense.saved + moe.saved) + 6 * tokens * VOCABULARY  # logits in bfloat16 and float32
    return Plan(PARAMETER_BYTES * (replicated + sharded), activations, seconds, RANKS * tokens, device.memory_gb * 1e9)


def attention_seconds(tokens: int, model_dim: int, device: Device) -> float:
    """Forward and backward of one layer: four projections, and scores and values over the context; FLOPs alone."""
    return device.computing(3 * tokens * (8 * model_dim**2 + 4 * CONTEXT * model_dim))


def reduction_seconds(size: float, ranks: int, per_node: int, device: Device) -> float:
    """An all-reduce of `size` bytes: each rank sends and receives them twice; the ranks of a node share its adapters."""
    if ranks == 1:
        return 0.0
    return device.over_infiniband(2 * size * (ranks - 1) / ranks) / per_node
