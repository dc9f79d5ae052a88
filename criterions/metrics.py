"""The routers' metrics: sums in the logging output of a batch, means in fairseq's log.

Names follow fairseq's `moe` branch where it has them. L MoE layers, E experts, k choices.
"""

import math
from typing import Any, Dict, List, Tuple

import torch
from fairseq.logging import metrics
from torch import Tensor

from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.layer import MoELayer

PREFIX = "moe/"  # of our entries in a logging output
AUX = "aux/"
AUX_METRICS = {"balance": "moe_gate_loss", "router_z": "moe_z_loss"}
FIFTH = 0.2  # of the experts, rounded up: the share of most and least used ones in `expert1_balance_*`


def routing_log(layers: List[MoELayer], sample_size: Any) -> Dict[str, Tensor]:
    """A batch's entries in fairseq's logging output: tensors that sum over ranks and accumulated batches.

    Their first dimension is the layers. A layer that did not run (LayerDrop) adds zeros: ranks sum their logs entry by
    entry, so all must have the same entries.
    """
    sums = [None if layer.routing is None else _layer_sums(layer.routing, sample_size) for layer in layers]
    example = next((entry for entry in sums if entry is not None), None) or _layer_sums(_empty_routing(layers[0]), 0)
    zeros = {name: torch.zeros_like(value) for name, value in example.items()}
    return {PREFIX + name: torch.stack([(entry or zeros)[name] for entry in sums]) for name in zeros}


@torch.no_grad()
def _empty_routing(layer: MoELayer) -> Routing:
    """The Routing of zero tokens, for the names and shapes of the layer's statistics."""
    return layer.gate(next(layer.parameters()).new_zeros(0, layer.gate.model_dim))


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


def log_routing_metrics(totals: Dict[str, Tensor], sample_size: Any) -> None:
    """Log the metrics to fairseq. All are means over the MoE layers, except losses, which are sums over them."""
    totals, weight = on_host(totals, sample_size)
    divisor = max(weight, 1)
    for name in (name for name in totals if name.startswith(AUX)):
        short = name[len(AUX) :]
        metrics.log_scalar(AUX_METRICS.get(short, f"moe_{short}_loss"), totals[name].sum() / divisor, weight, round=3)
    tokens = totals["tokens"].clamp(min=1)  # [L]
    metrics.log_scalar("entropy_gating", (totals["entropy"] / tokens).mean(), weight, round=3)
    metrics.log_scalar("moe_argmax_share", (totals["argmax"] / tokens).mean(), weight, round=3)
    metrics.log_scalar("moe_experts_per_token", (totals["load"].sum((1, 2)) / tokens).mean(), weight, round=3)
    for choice in range(totals["load"].size(1)):
        _log_load(f"expert{choice + 1}", totals["load"][:, choice], totals["dropped"][:, choice], tokens, weight)
    spread = totals["load"].sum(1) / totals["load"].sum((1, 2)).clamp(min=1).unsqueeze(1) * totals["load"].size(2)  # [L, E]
    metrics.log_scalar("moe_load_max", spread.amax(1).mean(), weight, round=2)
    metrics.log_scalar("moe_load_min", spread.amin(1).mean(), weight, round=2)


def _log_load(name: str, load: Tensor, dropped: Tensor, tokens: Tensor, weight: Any) -> None:
    """Log, for load [L, E] and dropped [L] of one choice: top and bottom fifths in %, unused experts, dropped tokens in %."""
    fifth = max(math.ceil(FIFTH * load.size(1)), 1)
    share = 100 * load.sort(dim=1, descending=True).values / load.sum(1, keepdim=True).clamp(min=1)
    metrics.log_scalar(f"{name}_balance_top", share[:, :fifth].sum(1).mean(), weight, round=2)
    metrics.log_scalar(f"{name}_balance_bottom", share[:, -fifth:].sum(1).mean(), weight, round=2)
    metrics.log_scalar(f"unused_{name}_count", (load == 0).sum(1).to(share.dtype).mean(), weight, round=2)
    metrics.log_scalar(f"overflow_{name}", (100 * dropped / tokens).mean(), weight, round=2)
