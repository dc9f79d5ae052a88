"""Sharded checkpoints: a set of files from the same save, one for each rank of an expert group.

The files cannot be replaced atomically as a set. So each rank first writes a staged file, all ranks wait for each other,
and only then each renames its file. A kill in between leaves everything needed to finish, and `mend` does so when the set
is next read.
"""

import logging
import os
import re
import shutil
from functools import partial
from glob import escape, glob
from typing import Any, Dict, List, Optional

import torch
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.plugin.checkpoints.layout import layout_of, shard_path, suffix
from fairseq_sparsemixer.plugin.checkpoints.reading import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.writing import STAGED, Unwritable, replace_atomically, try_again

logger = logging.getLogger(__name__)

STAGED_SHARD = re.compile(rf"(checkpoint.*){suffix(0)[:-1]}\d+\.pt{re.escape(STAGED)}")


def agree_on_number(expert_group: ExpertGroup, number: int, device: torch.device) -> Optional[int]:
    """The number proposed by rank 0, on all ranks of its group; None on other ranks."""
    if not expert_group.first_group:
        return None
    shared = torch.tensor(number, device=device)
    dist.broadcast(shared, src=0, group=expert_group.group)
    return int(shared)


def read_set(path: str) -> List[Dict[str, Any]]:
    """The checkpoints of all ranks of the set `path`, with tensors memory-mapped.

    Raises ConfigurationError if a file is missing, or if the files are not from the same save.
    """
    first = read_checkpoint(shard_path(path, 0))
    paths = [shard_path(path, index) for index in range(layout_of(first)["size"])]
    states = {shard: read_checkpoint(shard) for shard in paths}
    refuse_mixture(path, states)
    return list(states.values())


def mend(path: str, size: int) -> None:
    """If a kill left a set of `size` files partly replaced, finish what the killed ranks had begun.

    Restores the newest complete save, under whatever file names. Raises ConfigurationError if there is none.
    """
    paths = [shard_path(path, index) for index in range(size)]
    states = {shard: read_checkpoint(shard) for shard in paths if os.path.exists(shard)}
    for state in states.values():
        require_size(path, layout_of(state)["size"], size)
    if len(states) == size and _of_one_save(states):
        return
    staged = [state for shard in paths for state in _read_if_whole(shard + STAGED)]
    if not states and len(staged) < size:
        return  # killed before the first save was on disk: nothing to resume from
    for save in _saves_by_age([*states.values(), *staged]):
        whole = _find_all(paths, save)
        if whole:
            for shard, found in zip(paths, whole):
                if found != shard:
                    logger.info("%s is not from the last complete save; restored from %s", shard, found)
                    try_again(partial(replace_atomically, shard, partial(shutil.copyfile, found)), shard)
            return
    for shard in paths:
        if shard not in states:
            raise ConfigurationError(f"{shard} is missing from the sharded checkpoint {path}; use another one")
    refuse_mixture(path, states)


def _saves_by_age(states: List[Dict[str, Any]]) -> List[Optional[int]]:
    """The save numbers of these checkpoints, the one with most updates first."""
    newest: Dict[Optional[int], int] = {}
    for state in states:
        save = layout_of(state)["save"]
        newest[save] = max(newest.get(save, 0), updates(state))
    return sorted(newest, key=newest.__getitem__, reverse=True)


def _find_all(paths: List[str], save: Optional[int]) -> Optional[List[str]]:
    """A file of that save for each rank, preferably its own; None if one is missing."""
    found: List[str] = []
    for index, path in enumerate(paths):
        file = _find(path, index, len(paths), save)
        if file is None:
            return None
        found.append(file)
    states = {path: read_checkpoint(path) for path in found}
    return found if _of_one_save(states) else None


def mend_folder(folder: str, size: int) -> None:
    """Mend the sets that a killed run may have left in its folder: the last, the best, and any with a staged file.

    Raises ConfigurationError if the last one cannot be completed, or there is no room to restore from staged files, which
    would be removed.
    """
    staged = (STAGED_SHARD.fullmatch(name) for name in (os.listdir(folder) if os.path.isdir(folder) else ()))
    names = {"checkpoint_best.pt", *(f"{found.group(1)}.pt" for found in staged if found)} - {"checkpoint_last.pt"}
    mend(os.path.join(folder, "checkpoint_last.pt"), size)
    for name in sorted(names):
        try:
            mend(os.path.join(folder, name), size)
        except Unwritable:
            raise
        except ConfigurationError as error:
            logger.warning("%s", error.message)  # the run continues without it


def require_size(path: str, found: int, wanted: int) -> None:
    """Raise ConfigurationError if a set has `found` files but the run's experts are sharded over `wanted` ranks."""
    if found != wanted:
        raise ConfigurationError(
            f"{path} was written with experts sharded over {found} ranks, but this run has --expert-parallel-size {wanted};"
            f" convert it: fairseq-sparsemixer reshard IN OUT --expert-parallel-size {wanted}"
        )


def _read_if_whole(path: str) -> List[Dict[str, Any]]:
    """A list with the checkpoint; empty if it does not exist or cannot be read."""
    if not os.path.exists(path):
        return []
    try:
        return [read_checkpoint(path)]
    except ConfigurationError as error:
        logger.warning("%s", error.message)  # an unreadable file cannot replace another
        return []


def _find(path: str, index: int, size: int, save: Optional[int]) -> Optional[str]:
    """A file of that save for rank `index` of `size`: `path`, or any other checkpoint in its folder."""
    pattern = os.path.join(escape(os.path.dirname(path) or "."), f"checkpoint*{suffix(index)}.pt")
    for candidate in (path, path + STAGED, *sorted(glob(pattern + STAGED)), *sorted(glob(pattern))):
        for state in _read_if_whole(candidate):
            layout = layout_of(state)
            if (layout["save"], layout["size"], layout["index"]) == (save, size, index):
                return candidate
    return None


def _of_one_save(states: Dict[str, Dict[str, Any]]) -> bool:
    return len({(layout_of(state)["size"], layout_of(state)["save"], updates(state)) for state in states.values()}) <= 1


def refuse_mixture(path: str, states: Dict[str, Dict[str, Any]]) -> None:
    """Raise ConfigurationError if the files of a set, by name, are not from the same save."""
    if not _of_one_save(states):
        each = ", ".join(f"{os.path.basename(name)} at update {updates(state)}" for name, state in states.items())
        raise ConfigurationError(f"the files of the sharded checkpoint {path} are from different saves ({each}); use another one")


def updates(state: Dict[str, Any]) -> int:
    """The number of updates behind a checkpoint."""
    history = state.get("optimizer_history") or [{}]
    return history[-1].get("num_updates", 0)
