"""Gathers the experts of all ranks on the CPU of rank 0, and slices of optimizer state, one tensor at a time."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices
from fairseq_sparsemixer.plugin.checkpoints.layout import counts_experts


class Gathered(NamedTuple):
    """models: tensors of all E experts by name, for each requested model. optimizer: {parameter index: {state name: tensor}}.

    On ranks other than 0, each tensor is None.
    """

    models: List[Dict[str, Optional[Tensor]]]
    optimizer: Dict[int, Dict[str, Optional[Tensor]]]


def gather_experts(
    models: List[Dict[str, Tensor]],
    optimizer: Optional[Optimizer],
    expert_group: ExpertGroup,
    slices: Optional[ReplicaSlices] = None,
) -> Optional[Gathered]:
    """Gather each rank's shard of the experts, by name; a collective of all ranks. None outside the group of rank 0.

    slices: those that the optimizer updates; None if it updates whole parameters.
    """

    def gather(share: Tensor) -> Optional[Tensor]:  # the other groups are replicas: the first one has every expert
        return _gather(share.detach(), expert_group) if expert_group.first_group else None

    state = {} if optimizer is None else _each_state(optimizer, slices, gather)
    if not expert_group.first_group:
        return None
    return Gathered([{name: gather(share) for name, share in model.items()} for model in models], state)


def complete_state(optimizer: Optimizer, expert_group: ExpertGroup, slices: ReplicaSlices) -> Optional[Gathered]:
    """The optimizer state of this rank's experts from the slices of all replicas; otherwise as gather_experts."""
    state = _each_state(optimizer, slices, lambda share: share.cpu() if expert_group.first_group else None)
    return Gathered([], state) if expert_group.first_group else None


def _each_state(
    optimizer: Optimizer, slices: Optional[ReplicaSlices], keep: Callable[[Tensor], Optional[Tensor]]
) -> Dict[int, Dict[str, Optional[Tensor]]]:
    """What `keep` returns for each tensor [E / G, ...] of the experts' optimizer state; all ranks call it in the same order."""
    kept: Dict[int, Dict[str, Optional[Tensor]]] = {}
    numbered = enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])
    experts = [(index, parameter) for index, parameter in numbered if hasattr(parameter, "expert")]
    for place, (index, parameter) in enumerate(experts):
        kept[index] = {}
        for name, value in sorted(optimizer.state.get(parameter, {}).items()):
            if counts_experts(value):
                shape = parameter.shape if slices is None else slices.parameters[place].shape
                kept[index][name] = keep(value if slices is None else slices.whole(value, shape))
    return kept


def keep_slices(state: Dict[str, Any], shapes: Dict[int, torch.Size], slices: ReplicaSlices) -> Dict[str, Any]:
    """A checkpoint with this rank's slices of the experts' optimizer state, given the shapes of the whole by index.

    Tensors of other shapes do not fit, and stay.
    """
    optimizer = state.get("last_optimizer_state")
    if not optimizer:
        return state
    entries = dict(optimizer["state"])
    for index in entries.keys() & shapes.keys():
        fit = {name for name, value in entries[index].items() if torch.is_tensor(value) and value.shape == shapes[index]}
        entries[index] = {name: slices.own(value) if name in fit else value for name, value in entries[index].items()}
    return {**state, "last_optimizer_state": {**optimizer, "state": entries}}


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
