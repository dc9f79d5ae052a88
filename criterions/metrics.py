"""The routers' metrics: sums in the logging output of a batch, figures in fairseq's log.

Names are those of fairseq's `moe` branch where it has them. L MoE layers, E experts, k choices.
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
FIFTH = 0.2  # of the experts, rounded up: the most and the least used ones that `expert1_balance_*` speaks of


def routing_log(layers: List[MoELayer], sample_size: Any) -> Dict[str, Tensor]:
    """What a batch adds to fairseq's logging output: tensors that add up over ranks and accumulated batches.

    Each has the layers as its first dimension. A layer that did not run (LayerDrop) adds zeros: ranks add their logs up
    entry by entry, so that all must have the same entries.
    """
    sums = [None if layer.routing is None else _layer_sums(layer.routing, sample_size) for layer in layers]
    example = next((entry for entry in sums if entry is not None), None) or _layer_sums(_empty_routing(layers[0]), 0)
    zeros = {name: torch.zeros_like(value) for name, value in example.items()}
    return {PREFIX + name: torch.stack([(entry or zeros)[name] for entry in sums]) for name in zeros}


@torch.no_grad()
def _empty_routing(layer: MoELayer) -> Routing:
    """The Routing of no tokens, for the names and shapes of what the layer reports."""
    return layer.gate(next(layer.parameters()).new_zeros(0, layer.gate.model_dim))


def _layer_sums(routing: Routing, sample_size: Any) -> Dict[str, Tensor]:
    sums = routing.statistics()
    for name, loss in routing.aux_losses.items():
        sums[AUX + name] = loss.detach() * sample_size
    return sums


def sum_routing_logs(logging_outputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    """The entries of routing_log added up over logging outputs; empty when the model has no experts."""
    names = {name for log in logging_outputs for name in log if name.startswith(PREFIX)}
    return {name[len(PREFIX) :]: sum(log[name] for log in logging_outputs if name in log).detach() for name in sorted(names)}


def on_host(totals: Dict[str, Tensor], sample_size: Any) -> Tuple[Dict[str, Tensor], Any]:
    """The same in float64 on the CPU, and the sample size as a number: one copy from the device, and one wait, for all."""
    given = torch.as_tensor(sample_size)
    device = next(iter(totals.values())).device
    flat = torch.cat([value.reshape(-1).double() for value in totals.values()] + [given.to(device).reshape(1).double()]).cpu()
    *parts, size = flat.split([value.numel() for value in totals.values()] + [1])
    return {name: part.view(totals[name].shape) for name, part in zip(totals, parts)}, size.item()


def log_routing_metrics(totals: Dict[str, Tensor], sample_size: Any) -> None:
    """Hand the figures to fairseq's metrics. All are means over the MoE layers, but losses, which are sums over them."""
    totals, weight = on_host(totals, sample_size)
    divisor = max(weight, 1)
    for name in (name for name in totals if name.startswith(AUX)):
        short = name[len(AUX) :]
        metrics.log_scalar(AUX_METRICS.get(short, f"moe_{short}_loss"), totals[name].sum() / divisor, weight, round=3)
    tokens = totals["tokens"].clamp(min=1)  # [L]
    metrics.log_scalar("entropy_gating", (totals["entropy"] / tokens).mean(), weight, round=3)
    metrics.log_scalar("moe_argmax_share", (totals["argmax"] / tokens).mean(), weight, round=3)
    for choice in range(totals["load"].size(1)):
        _log_load(f"expert{choice + 1}", totals["load"][:, choice], totals["dropped"][:, choice], tokens, weight)
    spread = totals["load"].sum(1) / totals["load"].sum((1, 2)).clamp(min=1).unsqueeze(1) * totals["load"].size(2)  # [L, E]
    metrics.log_scalar("moe_load_max", spread.amax(1).mean(), weight, round=2)
    metrics.log_scalar("moe_load_min", spread.amin(1).mean(), weight, round=2)


def _log_load(name: str, load: Tensor, dropped: Tensor, tokens: Tensor, weight: Any) -> None:
    """load [L, E] and dropped [L] of one choice: shares of the fifths in %, unused experts, dropped tokens in %."""
    fifth = max(math.ceil(FIFTH * load.size(1)), 1)
    share = 100 * load.sort(dim=1, descending=True).values / load.sum(1, keepdim=True).clamp(min=1)
    metrics.log_scalar(f"{name}_balance_top", share[:, :fifth].sum(1).mean(), weight, round=2)
    metrics.log_scalar(f"{name}_balance_bottom", share[:, -fifth:].sum(1).mean(), weight, round=2)
    metrics.log_scalar(f"unused_{name}_count", (load == 0).sum(1).to(share.dtype).mean(), weight, round=2)
    metrics.log_scalar(f"overflow_{name}", (100 * dropped / tokens).mean(), weight, round=2)
