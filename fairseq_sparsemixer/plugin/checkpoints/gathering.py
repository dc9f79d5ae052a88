"""Gathers the experts of all ranks on the CPU of rank 0, one tensor at a time."""

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.plugin.checkpoints.layout import counts_experts


class Gathered(NamedTuple):
    """models: tensors of all E experts by name, for each requested model. optimizer: {parameter index: {state name: tensor}}.

    On ranks other than 0, each tensor is None.
    """

    models: List[Dict[str, Optional[Tensor]]]
    optimizer: Dict[int, Dict[str, Optional[Tensor]]]


def gather_experts(
    models: List[Dict[str, Tensor]], optimizer: Optional[torch.optim.Optimizer], expert_group: ExpertGroup
) -> Optional[Gathered]:
    """Gather each rank's shard of the experts, by name; a collective of all ranks. None outside the group of rank 0."""
    if not expert_group.first_group:
        return None  # a replica: the first group has every expert
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
    for rank in range(1, expert_group.size):  # one at a time: all experts may not fit on a GPU
        dist.recv(arriving, src=rank, group=expert_group.group)
        parts.append(arriving.to("cpu", copy=True))
    return torch.cat(parts)


def fill_in(state: Dict[str, Any], names: List[str], gathered: Gathered) -> None:
    """Replace rank 0's own tensors by the gathered ones in the state that fairseq is about to write.

    names: of the gathered models; "model", or the key of its copy in extra_state.
    """
    for name, tensors in zip(names, gathered.models):
        holder = state if name == "model" else state["extra_state"]
        holder[name] = {**holder[name], **tensors}
    if gathered.optimizer:  # copy, because state_dict returns the optimizer's own dictionaries
        by_index = {
            index: {**values, **gathered.optimizer.get(index, {})}
            for index, values in state["last_optimizer_state"]["state"].items()
        }
        state["last_optimizer_state"] = {**state["last_optimizer_state"], "state": by_index}
