"""The routers' metrics: sums in the logging output of a batch, means in fairseq's log.

Names follow fairseq's `moe` branch where it has them. L MoE layers, E experts, k choices. If layers have different numbers of
experts, loads are padded to the largest with NaN, which stays NaN when ranks and batches are summed.
"""

import math
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.layer import MoELayer
from fairseq_sparsemixer.moe.turns import balancing_alone

PREFIX = "moe/"  # of our entries in a logging output
AUX = "aux/"
AUX_METRICS = {"balance": "moe_gate_loss", "router_z": "moe_z_loss"}
BY_EXPERT = ("load", "chosen")  # statistics [k, E]
FIFTH = 0.2  # of the experts, rounded up: the share of most and least used ones in `expert1_balance_*`


def routing_log(
    layers: List[MoELayer], sample_size: Any, of_model: Optional[Dict[str, Optional[Tensor]]] = None
) -> Dict[str, Tensor]:
    """A batch's entries in fairseq's logging output: tensors that sum over ranks and accumulated batches.

    Their first dimension is the layers. A layer that did not run (LayerDrop) adds zeros: ranks sum their logs entry by
    entry, so all must have the same entries. of_model: losses of all layers together, by name; None where there is none.
    """
    sums = [None if layer.routing is None else _layer_sums(layer.routing, sample_size) for layer in layers]
    example = next((entry for entry in sums if entry is not None), None) or _layer_sums(_empty_routing(layers[0]), 0)
    zeros = {name: torch.zeros_like(value) for name, value in example.items()}
    sizes = [layer.gate.num_experts if layer.routing is None else layer.routing.num_experts for layer in layers]
    entries = {name: [(entry or zeros)[name] for entry in sums] for name in zeros}
    for name in BY_EXPERT:
        entries[name] = [_padded(value, size, max(sizes)) for value, size in zip(entries[name], sizes)]
    losses = {AUX + name: [loss.detach() * sample_size] for name, loss in (of_model or {}).items() if loss is not None}
    return {PREFIX + name: torch.stack(values) for name, values in {**entries, **losses}.items()}


def _padded(load: Tensor, num_experts: int, most: int) -> Tensor:
    """load [k, E] of a layer, or zeros [k, any] if it did not run -> [k, most]."""
    if load.size(1) == num_experts == most:
        return load
    own = load if load.size(1) == num_experts else load.new_zeros(load.size(0), num_experts)
    return torch.nn.functional.pad(own, (0, most - num_experts), value=math.nan)


@torch.no_grad()
def _empty_routing(layer: MoELayer) -> Routing:
    """The Routing of zero tokens, for the names and shapes of the layer's statistics."""
    tokens = next(layer.parameters()).new_zeros(0, layer.gate.model_dim)
    with balancing_alone([layer]):  # it is no forward of the model
        routing = layer.gate(tokens)
    return routing if layer.cmr is None else replace(routing, cmr_gate=tokens[:, 0].float())


def _layer_sums(routing: Routing, sample_size: Any) -> Dict[str, Tensor]:
    sums = routing.statistics()
    for name, loss in routing.aux_losses.items():
        sums[AUX + name] = loss.detach() * sample_size
    return sums


def sum_routing_logs(logging_outputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    """The entries of routing_log summed over logging outputs; empty if the model has no experts."""
    names = {name for log in logging_outputs for name in log if name.startswith(PREFIX)}
    return {name[len(PREFIX) :]: sum(log[name] for log in logging_outputs if name in log).detach() for name in sorted(names)}


def on_host(totals: Dict[str, Tensor], sample_size: Any) -> Tuple[Dict[str, Tensor], Any]:
    """The totals in float64 on the CPU, and the sample size as a number, with a single copy from the device."""
    given = torch.as_tensor(sample_size)
    device = next(iter(totals.values())).device
    flat = torch.cat([value.reshape(-1).double() for value in totals.values()] + [given.to(device).reshape(1).double()]).cpu()
    *parts, size = flat.split([value.numel() for value in totals.values()] + [1])
    return {name: part.view(totals[name].shape) for name, part in zip(totals, parts)}, size.item()


def log_routing_metrics(totals: Dict[str, Tensor], sample_size: Any, layers: Sequence[str] = ()) -> None:
    """Log the metrics to fairseq. All are means over the MoE layers, except losses, which are sums over them.

    layers: the layers' names, to log each one's own figures, too, as LAYER/METRIC.
    """
    totals, weight = on_host(totals, sample_size)
    for name, (values, digits) in routing_metrics(totals, max(weight, 1)).items():
        together = values.sum() if name.endswith("_loss") else values.mean()
        metrics.log_scalar(name, together, weight, round=digits)
        for layer, value in zip(layers, values if len(values) == len(layers) else ()):  # a loss may be of all layers together
            metrics.log_scalar(f"{layer}/{name}", value, weight, round=digits)


def routing_metrics(totals: Dict[str, Tensor], sample_size: Any) -> Dict[str, Tuple[Tensor, int]]:
    """(value of each layer [L], digits to show) of each metric, from totals on the host."""
    found: Dict[str, Tuple[Tensor, int]] = {}
    for name in (name for name in totals if name.startswith(AUX)):
        short = name[len(AUX) :]
        found[AUX_METRICS.get(short, f"moe_{short}_loss")] = totals[name] / sample_size, 3
    tokens = totals["tokens"].clamp(min=1)  # [L]
    found["entropy_gating"] = totals["entropy"] / tokens, 3
    if "cmr_gate" in totals:
        found["moe_cmr_gate"] = totals["cmr_gate"] / tokens, 3
    found["moe_argmax_share"] = totals["argmax"] / tokens, 3
    loads = [load[:, ~load.isnan().any(0)] for load in totals["load"]]  # L times [k, E]
    found["moe_experts_per_token"] = torch.stack([load.sum() for load in loads]) / tokens, 3
    for choice in range(totals["load"].size(1)):
        of_choice = _load_metrics([load[choice] for load in loads], totals["dropped"][:, choice], tokens)
        found.update({name.format(f"expert{choice + 1}"): (values, 2) for name, values in of_choice.items()})
    spread = [load.sum(0) / load.sum().clamp(min=1) * load.size(1) for load in loads]  # L times [E], 1 if balanced
    found["moe_load_max"] = torch.stack([layer.max() for layer in spread]), 2
    found["moe_load_min"] = torch.stack([layer.min() for layer in spread]), 2
    return found


def _load_metrics(loads: List[Tensor], dropped: Tensor, tokens: Tensor) -> Dict[str, Tensor]:
    """[L] each, for L loads [E] and dropped [L] of a choice: top and bottom fifths in %, unused experts, dropped tokens in %."""
    shares = [100 * load.sort(descending=True).values / load.sum().clamp(min=1) for load in loads]
    fifths = [max(math.ceil(FIFTH * len(load)), 1) for load in loads]
    return {
        "{}_balance_top": torch.stack([s[:n].sum() for s, n in zip(shares, fifths)]),
        "{}_balance_bottom": torch.stack([s[-n:].sum() for s, n in zip(shares, fifths)]),
        "unused_{}_count": torch.stack([(load == 0).sum() for load in loads]).double(),
        "overflow_{}": 100 * dropped / tokens,
    }
