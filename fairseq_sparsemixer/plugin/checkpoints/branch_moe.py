"""Converts checkpoints of fairseq's branches `moe` and `nllb` to `transformer_moe` and `transformer_lm_moe`.

A checkpoint NAME.pt is a set of files: NAME-rank-N.pt holds the experts of rank N, NAME-shared.pt everything else. With
--use-sharded-state the names end in -shardN.pt. Of W ranks and E experts, rank N has the E / W experts from N * E / W; with
more ranks than experts, the ranks from E on repeat the first E. Names in a layer, theirs on the left, j counted in its file:

    moe_layer.gate.wg.weight [E, M]                       fc1.moe.gate.projection.weight
    moe_layer.experts.j.fc1.weight [H, M], .bias [H]      fc1.moe.experts.weight_in [E, M, H], bias_in [E, H]
    moe_layer.experts.j.fc2.weight [M, H], .bias [M]      fc1.moe.experts.weight_out [E, H, M], bias_out [E, M]

Files are memory-mapped and read one after the other, so memory is that of the result and of one file.
"""

import argparse
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from glob import escape, glob
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS, count_layers
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.branch_arguments import (
    arguments,
    known_by,
    loss_flags,
    loss_weights,
    notes,
    our_options,
    training_flags,
)
from fairseq_sparsemixer.plugin.checkpoints.branch_cmr import rename_cmr, without_cmr_copies
from fairseq_sparsemixer.plugin.checkpoints.converting import Converted
from fairseq_sparsemixer.plugin.checkpoints.layout import LAYOUT
from fairseq_sparsemixer.plugin.checkpoints.reading import read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.skeleton import BUFFER, build_skeleton
from fairseq_sparsemixer.plugin.models.fast_path import without_copies
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS

RANK_FILE = re.compile(r"-rank-(\d+)(?:-shard\1)?\.pt")
SHARED_FILE = re.compile(r"-shared(?:-shard\d+)?\.pt")
EXPERT = re.compile(r"(?P<layer>.+)\.moe_layer\.experts\.(?P<index>\d+)\.(?P<part>fc[12]\.(?:weight|bias))")
PARTS = {"fc1.weight": "weight_in", "fc1.bias": "bias_in", "fc2.weight": "weight_out", "fc2.bias": "bias_out"}
GATE, OUR_GATE = ".moe_layer.gate.wg.weight", ".fc1.moe.gate.projection.weight"

OTHER_MODELS = {  # part of a parameter's name -> what has it
    "flat_param": "flat shards of --use-sharded-state, which only fairscale can put together; consolidate it with the branch",
    "expert_centroids": "BASE layers, which are another model",
    "expert_network": "BASE layers, which are another model",
}

NO_UPDATES = {"num_updates": 0, "optimizer_name": "", "criterion_name": "", "lr_scheduler_state": {}}  # fairseq wants an entry


@dataclass
class FileSet:
    """The files of a checkpoint: those of the ranks by number, and the shared one. `stem` is their common beginning."""

    stem: str
    ranks: Dict[int, str]
    shared: Optional[str]

    def all(self) -> List[str]:
        """Every file."""
        return [*self.ranks.values(), *([self.shared] if self.shared else [])]

    def require_ranks(self, count: int) -> None:
        """Raise ConfigurationError, naming the files, unless those of the first `count` ranks are there."""
        sharded = any("-shard" in name[len(self.stem) :] for name in self.ranks.values())
        missing = [rank for rank in range(count) if rank not in self.ranks]
        if missing:
            names = ", ".join(f"{self.stem}-rank-{rank}{f'-shard{rank}' if sharded else ''}.pt" for rank in missing)
            raise ConfigurationError(f"files of the checkpoint are missing: {names}; copy them beside the others")


def files_of_set(path: str) -> Optional[FileSet]:
    """The set of files named as if it were the file `path`; None if `path` exists, or no file of a rank does."""
    stem = path[: -len(".pt")] if path.endswith(".pt") else path
    names = [] if os.path.exists(path) else sorted(glob(escape(stem) + "-*.pt"))
    ranks = {int(found[1]): name for name in names if (found := RANK_FILE.fullmatch(name[len(stem) :]))}
    shared = [name for name in names if SHARED_FILE.fullmatch(name[len(stem) :])]  # if several, all hold the same
    return FileSet(stem, dict(sorted(ranks.items())), shared[0] if shared else None) if ranks else None


def convert_set(files: FileSet) -> Converted:
    """A checkpoint of the branches -> one of ours that computes the same at evaluation, if theirs drops no token.

    Raises ConfigurationError for missing files, and for models that ours cannot be.
    """
    files.require_ranks(1)
    first = read_checkpoint(files.ranks[0], of_branch=True)
    if LAYOUT in first:
        raise ConfigurationError("the checkpoint is already one of fairseq-sparsemixer; reshard makes one file of it")
    if files.shared is None:
        raise ConfigurationError(f"files of the checkpoint are missing: {files.stem}-shared.pt; copy it beside the others")
    shared = without_copies(read_checkpoint(files.shared, of_branch=True)["model"])
    _refuse_other_models([*first["model"], *shared], "shard_metadata" in first)
    theirs = arguments(first.get("cfg") or {})
    shared = rename_cmr(without_cmr_copies(shared), bool(theirs.get("moe_cmr")))
    arch = "transformer_moe" if any(name.startswith("encoder.") for name in shared) else "transformer_lm_moe"
    options = our_options(theirs, STACKS if arch == "transformer_moe" else STACKS[1:])
    own = {option.name: getattr(options, option.name) for option in fields(MoEOptions)}
    model = argparse.Namespace(**{**theirs, **own, "_name": arch, "arch": arch, "user_dir": None})
    with _in_their_arguments():
        skeleton = build_skeleton(model, shared)
    weights = _take_shared(skeleton, shared)
    _fill_experts(weights, skeleton, files, first, options.num_experts)
    losses = loss_weights(first["cfg"].get("criterion"), options.moe_cmr, count_layers(weights))
    trained = [name for name, _ in skeleton.named_parameters()]
    state = {
        "args": None,
        "cfg": _configuration(first["cfg"], model, losses),
        "model": weights,
        "optimizer_history": first.get("optimizer_history") or [NO_UPDATES],
        "extra_state": {"train_iterator": (first.get("extra_state") or {}).get("train_iterator", {"epoch": 1})},
        "task_state": first.get("task_state") or {},
        LAYOUT: {"size": 1, "index": 0, "save": None, "optimizer": [i for i, n in enumerate(trained) if EXPERTS in n]},
    }
    left_out = "the branch stores it by the position of parameters in each rank's model"
    flags = training_flags(arch, options) + loss_flags(losses)
    return Converted(state, options, left_out, flags, notes(theirs, options))


@contextmanager
def _in_their_arguments() -> Iterator[None]:
    """Say of a refused flag, which has our name, that it is the checkpoint's."""
    try:
        yield
    except ConfigurationError as error:
        if error.message.startswith("the checkpoint"):
            raise
        raise ConfigurationError(f"the checkpoint's own arguments are not possible: {error.message}") from None


def _refuse_other_models(names: Iterable[str], flat: bool) -> None:
    for part, what in OTHER_MODELS.items():
        if any(part in name for name in names) or (flat and part == "flat_param"):
            raise ConfigurationError(f"the checkpoint has {what}")


def _configuration(cfg: Dict[str, Any], model: argparse.Namespace, losses: Dict[str, float]) -> Dict[str, Any]:
    """Their configuration with our model and weights of losses, and of their task and criterion what ours, or fairseq's, know."""
    task, criterion = cfg.get("task"), cfg.get("criterion")
    if isinstance(task, dict):
        task = known_by(TASK_DATACLASS_REGISTRY, task)
    common = {**cfg["common"], "user_dir": None} if isinstance(cfg.get("common"), dict) else cfg.get("common")
    changed = {"common": common, "task": task, "model": model}
    if criterion:
        changed["criterion"] = known_by(CRITERION_DATACLASS_REGISTRY, criterion, **losses)
    return {**cfg, **changed}


def _take_shared(skeleton: nn.Module, shared: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Our weights from their shared file, that is, all but the experts. Raises ConfigurationError unless all fit."""
    expected, buffers = skeleton.state_dict(), {name for name, _ in skeleton.named_buffers()}
    theirs = {name: name.replace(OUR_GATE, GATE) for name in expected if EXPERTS not in name}
    for name, their_name in theirs.items():
        if name not in buffers and (their_name not in shared or shared[their_name].shape != expected[name].shape):
            found = f"of {tuple(shared[their_name].shape)}" if their_name in shared else "missing"
            raise ConfigurationError(
                f"the checkpoint's {their_name} is {found}, but its own arguments require {tuple(expected[name].shape)};"
                " use an unchanged checkpoint"
            )
    for name in shared.keys() - set(theirs.values()):
        if not BUFFER.fullmatch(name):
            raise ConfigurationError(f"the checkpoint has {name}, which our model does not have with the same arguments")
    return {name: shared[their_name] for name, their_name in theirs.items() if their_name in shared}


def _fill_experts(weights: Dict[str, Tensor], skeleton: nn.Module, files: FileSet, first: Dict[str, Any], count: int) -> None:
    """Add the stacks of all `count` experts to our weights, from one file after the other."""
    own = without_cmr_copies(first["model"])
    local = 1 + max((int(found["index"]) for name in own if (found := EXPERT.fullmatch(name))), default=0)
    if count % local:
        raise ConfigurationError(f"the checkpoint has {local} experts in a file, of {count}; use an unchanged checkpoint")
    dtype = next(iter(own.values())).dtype if own else torch.float32
    files.require_ranks(count // local)
    stacks = {name: torch.empty(t.shape, dtype=dtype) for name, t in skeleton.state_dict().items() if EXPERTS in name}
    for rank in range(count // local):
        model = without_cmr_copies(read_checkpoint(files.ranks[rank], of_branch=True)["model"])
        if len(model) != local * len(stacks):
            raise ConfigurationError(f"{files.ranks[rank]} has {len(model)} tensors of experts, not {local * len(stacks)}")
        for name, tensor in model.items():
            ours, index = _our_place(name)
            if ours not in stacks or index >= local or stacks[ours].shape[1:] != tensor.t().shape:
                raise ConfigurationError(f"{files.ranks[rank]} has {name} of {tuple(tensor.shape)}, unlike its arguments")
            stacks[ours][rank * local + index].copy_(tensor.t())  # t() leaves a bias unchanged
    weights.update(stacks)


def _our_place(name: str) -> Tuple[str, int]:
    """The name of the stack that holds their tensor, and its row in the part of this file."""
    found = EXPERT.fullmatch(name)
    return (f"{found['layer']}.fc1.moe.experts.{PARTS[found['part']]}", int(found["index"])) if found else ("", 0)
