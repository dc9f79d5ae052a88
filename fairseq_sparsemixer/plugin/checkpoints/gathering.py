"""Experts of all ranks on one of them. One tensor at a time travels, and ends on the CPU of rank 0."""

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.plugin.checkpoints.layout import counts_experts


class Gathered(NamedTuple):
    """models: tensors of all E experts by name, for each model asked. optimizer: {parameter index: {state name: tensor}}.

    On other ranks than 0 there is None for each tensor.
    """

    models: List[Dict[str, Optional[Tensor]]]
    optimizer: Dict[int, Dict[str, Optional[Tensor]]]


def gather_experts(
    models: List[Dict[str, Tensor]], optimizer: Optional[torch.optim.Optimizer], expert_group: ExpertGroup
) -> Optional[Gathered]:
    """From each rank's share of the experts, by name; a collective of all ranks. None outside the group of rank 0."""
    if not expert_group.first_group:
        return None  # replicas: the first group has every expert
    return Gathered(
        [{name: _gather(share.detach(), expert_group) for name, share in model.items()} for model in models],
        {} if optimizer is None else _gather_optimizer(optimizer, expert_group),
    )


def _gather_optimizer(optimizer: torch.optim.Optimizer, expert_group: ExpertGroup) -> Dict[int, Dict[str, Optional[Tensor]]]:
    gathered: Dict[int, Dict[str, Optional[Tensor]]] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        if hasattr(parameter, "expert"):
            state = optimizer.state.get(parameter, {})
            gathered[index] = {
                name: _gather(value, expert_group) for name, value in sorted(state.items()) if counts_experts(value)
            }
    return gathered


def _gather(share: Tensor, expert_group: ExpertGroup) -> Optional[Tensor]:
    """share [E / G, ...] of each rank -> [E, ...] on the CPU of rank 0, None elsewhere."""
    if expert_group.index > 0:
        dist.send(share.contiguous(), dst=0, group=expert_group.group)
        return None
    parts, arriving = [share.cpu()], torch.empty_like(share)
    for rank in range(1, expert_group.size):  # one at a time: a GPU has no room for all experts
        dist.recv(arriving, src=rank, group=expert_group.group)
        parts.append(arriving.to("cpu", copy=True))
    return torch.cat(parts)


def fill_in(state: Dict[str, Any], names: List[str], gathered: Gathered) -> None:
    """Put the gathered tensors in the place of rank 0's own, in the state that fairseq is about to write.

    names: of the models gathered; "model", or the key of its copy in extra_state.
    """
    for name, tensors in zip(names, gathered.models):
        holder = state if name == "model" else state["extra_state"]
        holder[name] = {**holder[name], **tensors}
    if gathered.optimizer:  # what state_dict gave is the optimizer's own dictionaries
        by_index = {
            index: {**values, **gathered.optimizer.get(index, {})}
            for index, values in state["last_optimizer_state"]["state"].items()
        }
        state["last_optimizer_state"] = {**state["last_optimizer_state"], "state": by_index}
