"""Changes how experts are sharded over files, tensor by tensor, without loading a checkpoint into memory.

Inputs are memory-mapped. Rows from one file are passed through; rows from several files are concatenated in an unlinked
file beside the output, also mapped. The system can evict and re-read all of it, and the process itself holds one page at
a time.
"""

import errno
import math
import os
import tempfile
from dataclasses import dataclass
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS
from fairseq_sparsemixer.plugin.checkpoints import shards
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
from fairseq_sparsemixer.plugin.checkpoints.layout import (
    LAYOUT,
    Combine,
    combine_experts,
    files_of,
    layout_of,
    number_of_save,
    shard_path,
)
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint, refuse_special_file
from fairseq_sparsemixer.plugin.checkpoints.writing import (
    cannot_write,
    make_folder_of,
    refuse_special_target,
    require_targets,
    save_together,
)


@dataclass
class Resharded:
    """The files read and written, the number of experts, and whether there was optimizer state."""

    source: List[str]
    target: List[str]
    num_experts: int
    optimizer_state: bool


def reshard(source: str, target: str, size: int, with_optimizer: bool = True) -> Resharded:
    """Write the checkpoint `source` as `target`, its experts in `size` files; 1: one portable file.

    A sharded checkpoint is named as if it were one file: `checkpoint_last.pt` for checkpoint_last-rank-0.pt etc. All
    tensors are kept bit for bit, the optimizer's state included if wanted. Raises ConfigurationError for unusable files.
    """
    refuse_special_target(target)
    states, read = read_any(source)
    with one_sentence_for(source):
        num_experts = _count_experts(source, states)
    if size < 1 or num_experts % size:
        raise ConfigurationError(f"--expert-parallel-size {size} does not divide the {num_experts} experts of {source}")
    if not with_optimizer:
        states = [{**state, "last_optimizer_state": None} for state in states]
    optimizer = layout_of(states[0])["optimizer"]
    if states[0].get("last_optimizer_state") and optimizer is None:
        raise ConfigurationError(
            f"{source} does not say which optimizer state belongs to experts: an older fairseq-sparsemixer wrote it;"
            " load it in a run with --reset-optimizer"
        )
    written = files_of(target, size)
    save = number_of_save(size)
    make_folder_of(target)
    require_targets(written, read)

    def state_of(index: int) -> Dict[str, Any]:
        with one_sentence_for(source):
            state = combine_experts(states, _rows_from_files(size, index, target))
        state[LAYOUT] = {"size": size, "index": index, "save": save, "optimizer": optimizer}
        return state

    with writing_checkpoints(written):
        save_together(written, state_of)
    return Resharded(read, written, num_experts, bool(states[0].get("last_optimizer_state")))


def read_any(source: str) -> Tuple[List[Dict[str, Any]], List[str]]:
    """(states, files) of a portable checkpoint, or of a sharded one given by its common name. Raises ConfigurationError."""
    refuse_special_file(source)
    if os.path.exists(source):
        state = read_checkpoint(source)
        size = layout_of(state)["size"]
        if size > 1:
            raise ConfigurationError(f"{source} is one of {size} files; name the checkpoint without its -rank-N")
        return [state], [source]
    if not os.path.exists(shard_path(source, 0)):
        raise ConfigurationError(f"{source} does not exist, nor does {shard_path(source, 0)}")
    states = shards.read_set(source)
    return states, [shard_path(source, index) for index in range(len(states))]


def _count_experts(source: str, states: List[Dict[str, Any]]) -> int:
    """The greatest common divisor of the layers' numbers of experts: E if all layers have E."""
    rows = [sum(state["model"][name].size(0) for state in states) for name in states[0]["model"] if EXPERTS in name]
    if not rows:
        raise ConfigurationError(f"{source} has no experts; any number of ranks can load it as it is")
    return math.gcd(*rows)


def _rows_from_files(size: int, index: int, target: str) -> Combine:
    """Shares [E / G, ...] of an expert tensor -> the rows of part `index` of `size`, without materialising the whole."""

    def rows(shares: List[Tensor]) -> Tensor:
        count = sum(share.size(0) for share in shares) // size
        start, stop, first, pieces = index * count, (index + 1) * count, 0, []
        for share in shares:
            low, high = max(start - first, 0), min(stop - first, share.size(0))
            if low < high:
                pieces.append(share[low:high])
            first += share.size(0)
        return _without_the_rest(pieces[0]) if len(pieces) == 1 else put_together(pieces, target)

    return rows


def _without_the_rest(rows: Tensor) -> Tensor:
    """The same memory as a tensor with its own storage: torch.save writes the whole storage, not only the view."""
    rows = rows.contiguous()
    start = rows.storage_offset() * rows.element_size()
    storage = rows.untyped_storage()[start : start + rows.numel() * rows.element_size()]
    return torch.empty(0, dtype=rows.dtype).set_(storage, 0, rows.size(), rows.stride())


def put_together(pieces: List[Tensor], target: str) -> Tensor:
    """Concatenate pieces [n, ...] in a file beside `target` that is unlinked at once and freed after use.

    Raises ConfigurationError if there is no room for it.
    """
    shape = (sum(piece.size(0) for piece in pieces), *pieces[0].shape[1:])
    count = math.prod(shape)
    if not count:
        return torch.cat(pieces)
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(os.path.abspath(target)), prefix=".reshard-") as file:
            _take_room(file.fileno(), count * pieces[0].element_size())
            whole = torch.from_file(file.name, shared=True, size=count, dtype=pieces[0].dtype).view(shape)
    except OSError as error:
        raise cannot_write(target, error) from None
    torch.cat(pieces, out=whole)
    return whole


def _take_room(descriptor: int, size: int) -> None:
    """Have the disk keep room for a file: where there is none, a write to it as a mapped one ends the process by a signal."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:
        pass  # a system that has no such call
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot
            raise
