"""Experts of all ranks in one checkpoint, and each rank's share out of it.

A portable checkpoint is what a single process would have written: expert tensors have E rows, optimizer state included.
Tensors are gathered one at a time and moved to the CPU of rank 0, so that a device holds one more tensor at most.
"""

from typing import Any, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.parallel import ExpertGroup


class Gathered(NamedTuple):
    """models: expert tensors [E, ...] by name, for each model asked. optimizer: {parameter index: {state name: tensor}}."""

    models: List[Dict[str, Tensor]]
    optimizer: Dict[int, Dict[str, Tensor]]


def gather_experts(models: List[nn.Module], optimizer: Optional[torch.optim.Optimizer], ranks: ExpertGroup) -> Optional[Gathered]:
    """A collective of all ranks; what it returns matters on rank 0, and is None outside its group."""
    if not ranks.first_group:
        return None  # replicas: the first group has every expert
    return Gathered(
        [{name: _gather(p.detach(), ranks) for name, p in model.named_parameters() if hasattr(p, "expert")} for model in models],
        {} if optimizer is None else _gather_optimizer(optimizer, ranks),
    )


def _gather_optimizer(optimizer: torch.optim.Optimizer, ranks: ExpertGroup) -> Dict[int, Dict[str, Tensor]]:
    gathered: Dict[int, Dict[str, Tensor]] = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        if hasattr(parameter, "expert"):
            state = optimizer.state.get(parameter, {})
            gathered[index] = {
                name: _gather(value, ranks) for name, value in sorted(state.items()) if _is_by_expert(value, parameter)
            }
    return gathered


def _gather(share: Tensor, ranks: ExpertGroup) -> Optional[Tensor]:
    """share [E / G, ...] of each rank -> [E, ...] on the CPU of rank 0, None elsewhere."""
    parts = [torch.empty_like(share) for _ in range(ranks.size)] if ranks.index == 0 else None
    dist.gather(share.contiguous(), parts, dst=0, group=ranks.group)
    return torch.cat([part.cpu() for part in parts]) if parts else None


def fill_in(state: Dict[str, Any], gathered: Gathered) -> None:
    """Put the gathered tensors in the place of rank 0's own, in the state that fairseq is about to write."""
    holders = [state["model"], state["extra_state"].get("ema")]
    for holder, tensors in zip(holders, gathered.models):
        for name, tensor in tensors.items():
            holder[name] = tensor
    for index, tensors in gathered.optimizer.items():
        if index in state["last_optimizer_state"]["state"]:
            state["last_optimizer_state"]["state"][index].update(tensors)


def load_own_share(optimizer: torch.optim.Optimizer, ranks: ExpertGroup) -> None:
    """From now on, optimizer.load_state_dict takes this rank's rows out of states of all E experts."""

    def narrow(optimizer: torch.optim.Optimizer, state_dict: Dict[str, Any]) -> Dict[str, Any]:
        narrowed = dict(state_dict["state"])
        for index, parameter in enumerate(_parameters(optimizer)):
            if hasattr(parameter, "expert") and index in narrowed:
                narrowed[index] = {name: _own_rows(value, parameter, ranks) for name, value in narrowed[index].items()}
        return {**state_dict, "state": narrowed}

    optimizer.register_load_state_dict_pre_hook(narrow)


def _own_rows(value: Any, parameter: Tensor, ranks: ExpertGroup) -> Any:
    local = parameter.size(0)
    if torch.is_tensor(value) and value.dim() == parameter.dim() and value.size(0) == local * ranks.size:
        return value.narrow(0, ranks.index * local, local).clone()
    return value


def _is_by_expert(value: Any, parameter: Tensor) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.size(0) == parameter.size(0)


def _parameters(optimizer: torch.optim.Optimizer) -> List[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
