"""The checkpoint half of the trainer: saves and loads runs whose experts are sharded over ranks.

By default, rank 0 gathers the experts and writes the same checkpoint as a single process. With --sharded-checkpoints,
each rank of the first group writes its own experts to its own file.
"""

import logging
import os
import secrets
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from fairseq.utils import apply_to_sample
from omegaconf import open_dict
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.parallel import ExpertGroup
from fairseq_sparsemixer.moe.replica_slices import ReplicaSlices
from fairseq_sparsemixer.names import EXPERTS
from fairseq_sparsemixer.options import moe_option
from fairseq_sparsemixer.plugin.checkpoints import gathering, shards
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import lock_folder
from fairseq_sparsemixer.plugin.checkpoints.layout import LAYOUT, combine_experts, layout_of, own_rows, suffix
from fairseq_sparsemixer.plugin.checkpoints.merging import refuse_other_scale
from fairseq_sparsemixer.plugin.checkpoints.moments import refuse_misfits
from fairseq_sparsemixer.plugin.checkpoints.reading import changed_by, refuse_special_file
from fairseq_sparsemixer.plugin.checkpoints.writing import STAGED, remove_unfinished
from fairseq_sparsemixer.plugin.freezing import refuse_other_optimizer_state
from fairseq_sparsemixer.plugin.slicing_trainer import SlicingTrainer

logger = logging.getLogger(__name__)


class CheckpointingTrainer(SlicingTrainer):
    """fairseq's Trainer, with checkpoints that hold the experts of all ranks or, if sharded, record which ones they hold."""

    has_experts = False
    sharded = False
    in_train_step = False  # other ranks may be elsewhere then, so a collective would hang
    _gathered: Optional[gathering.Gathered] = None
    _save: Optional[int] = None  # see layout

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self.cfg.checkpoint.no_save and not self.tpu:
            self._by_master(lock_existing, self.cfg.checkpoint.save_dir)
        if self.sharded:
            self._by_master(shards.mend_folder, self.cfg.checkpoint.save_dir, self._ranks.size)

    def consolidate_optimizer(self) -> None:
        """Called by fairseq on every rank before some ranks save, so collectives belong here."""
        super().consolidate_optimizer()
        self._save = self._gathered = None  # fairseq does not always write what it asked to gather
        if self.expert_group is None or self.in_train_step:
            return
        optimizer = None if self.cfg.checkpoint.no_save_optimizer_state else self.optimizer.optimizer
        if not self.sharded:
            weights = list(self._expert_weights().values())
            self._gathered = gathering.gather_experts(weights, optimizer, self.expert_group, self.slices)
            return
        self._save = shards.agree_on_number(self.expert_group, secrets.randbits(62), self.device)
        if optimizer is not None and self.slices is not None:
            self._gathered = gathering.complete_state(optimizer, self.expert_group, self.slices)

    def state_dict(self) -> Dict[str, Any]:
        """See Trainer; includes the experts of all ranks if they were gathered."""
        state = super().state_dict()
        if self._gathered is not None:
            names = [] if self.sharded else list(self._expert_weights())
            gathering.fill_in(state, names, self._gathered)
            self._gathered = None
        if self.has_experts:
            place = {"size": self._ranks.size, "index": self._ranks.index} if self.sharded else {"size": 1, "index": 0}
            state[LAYOUT] = {**place, "save": self._save, "optimizer": self._expert_indices()}
        return state

    def save_checkpoint(self, filename: str, extra_state: Dict[str, Any]) -> Optional[str]:
        """See Trainer. Writes no crash.pt if a rank has only a part of the experts, or of their optimizer state."""
        if self.expert_group is None or self.in_train_step and self.sharded and not self.by_slices:
            return super().save_checkpoint(filename, extra_state)
        if self.sharded and not self.in_train_step:
            # no rank replaces its old file before all have written their new one: see shards
            os.makedirs(self.cfg.checkpoint.save_dir, exist_ok=True)
            written = super().save_checkpoint(filename + STAGED, extra_state)
            dist.barrier(group=self.expert_group.group)
            os.replace(filename + STAGED, filename)
            return written and os.path.abspath(filename)
        if self._gathered is None:
            if self.should_save_checkpoint_on_current_rank:
                shared = "optimizer states of experts" if self.by_slices else "experts"
                logger.warning("%s is not written: %s are sharded over ranks, and this rank holds only its own", filename, shared)
            return None
        return super().save_checkpoint(filename, extra_state)

    def load_checkpoint(self, filename: str, reset_optimizer: bool = False, *args: Any, **kwargs: Any):
        """See Trainer. Accepts any layout that holds what this rank needs.

        Raises ConfigurationError for a file that is missing or has another layout.
        """
        with open_dict(self.cfg):
            # otherwise fairseq broadcasts rank 0's copy as a pickle, which weights_only refuses on the receiving ranks
            self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        if self.has_experts and self.sharded:
            filename = self._own_shard(filename)
        self._require_on_all_ranks(filename)
        refuse_special_file(filename)
        if self.has_experts and not os.path.exists(filename):
            self._refuse_to_start_over(filename)
        change = partial(self._own_share, filename=filename, with_optimizer=not reset_optimizer)
        with self._one_sentence_for(filename), changed_by(change):
            extra_state = super().load_checkpoint(filename, reset_optimizer, *args, **kwargs)
            if self._optimizer is not None:
                with self.narrowed():
                    refuse_misfits(filename, self._optimizer, self._trained())
        if self.is_data_parallel_master:  # only after the run has loaded its checkpoint
            remove_unfinished(self.cfg.checkpoint.save_dir, staged=self.sharded and not self.cfg.checkpoint.no_save)
        return extra_state

    @contextmanager
    def _one_sentence_for(self, filename: str) -> Iterator[None]:
        """Turn fairseq's errors for a checkpoint that does not fit the run into ConfigurationError."""
        try:
            yield
        except ConfigurationError:
            raise
        except Exception as error:
            if isinstance(error.__context__, ConfigurationError):
                raise error.__context__ from None  # fairseq replaced the reason by its own advice
            if isinstance(error, RuntimeError):
                raise  # from another rank, or out of device memory
            reason = error.__context__ if type(error) is Exception and error.__context__ else error
            raise ConfigurationError(
                f"{filename} does not fit this run ({_first_words(reason)}); give the flags it was trained with, or"
                " --reset-optimizer --reset-lr-scheduler --reset-meters to load only its weights"
            ) from None

    def _own_shard(self, filename: str) -> str:
        """The file to read in a run with --sharded-checkpoints: this rank's shard, else the whole model's file."""
        whole = filename.replace(suffix(self._ranks.index) + ".pt", ".pt")
        self._by_master(shards.mend, whole, self._ranks.size)
        shard = shards.shard_path(whole, self._ranks.index)
        return whole if os.path.exists(whole) and not os.path.exists(shard) else shard

    def _require_on_all_ranks(self, filename: str) -> None:
        """Raise ConfigurationError if only some ranks see the file and others would start from scratch; a collective."""
        if self.data_parallel_world_size > 1:
            seen = torch.tensor(int(os.path.exists(filename)), device=self.device)
            dist.all_reduce(seen)
            if 0 < seen < self.data_parallel_world_size:
                raise ConfigurationError(
                    f"{filename} is visible to {seen} of {self.data_parallel_world_size} ranks; put it where all nodes see it"
                )

    def _by_master(self, action: Callable[..., None], *arguments: Any) -> None:
        """Run an action on rank 0 while the others wait; if it fails, every rank raises its ConfigurationError."""
        sentence: List[Optional[str]] = [None]
        if self.is_data_parallel_master:
            try:
                action(*arguments)
            except ConfigurationError as error:
                sentence = [error.message]
        if self.data_parallel_world_size > 1:
            dist.broadcast_object_list(sentence, device=self.device)
        if sentence[0] is not None:
            raise ConfigurationError(sentence[0])

    def _refuse_to_start_over(self, filename: str) -> None:
        restore_file = self.cfg.checkpoint.restore_file
        if os.path.exists(shards.shard_path(filename, 0)):
            raise ConfigurationError(
                f"{filename} is a sharded checkpoint ({shards.shard_path(filename, 0)}, ...); resume on as many ranks with"
                f" --sharded-checkpoints, or convert it: fairseq-sparsemixer reshard {filename} OUT --portable"
            )
        if restore_file != "checkpoint_last.pt":
            raise ConfigurationError(f"--restore-file {restore_file} does not exist ({filename})")

    def _own_share(self, state: Dict[str, Any], filename: str, with_optimizer: bool) -> Dict[str, Any]:
        """The part that this rank needs of a checkpoint read by fairseq."""
        if with_optimizer:
            refuse_other_optimizer_state(state, filename, self.get_model(), moe_option(self.cfg.model, "freeze"))
        refuse_other_scale(state, filename, self.cfg.model)
        if self.has_experts:
            state = self._own_experts(state, filename)
        return start_average(state) if self.cfg.ema.store_ema else state

    def _own_experts(self, state: Dict[str, Any], filename: str) -> Dict[str, Any]:
        layout, size = layout_of(state), 1 if self.expert_group is None else self.expert_group.size
        if layout["size"] > 1:
            shards.require_size(filename, layout["size"], size)
        model = state["model"]  # loads whole or in part: see Experts
        if self.expert_group is not None and layout["size"] == 1:
            state = combine_experts([state], own_rows(size, self.expert_group.index), self._expert_indices())
        if self.by_slices:
            shapes = {index: parameter.shape for index, (name, parameter) in enumerate(self._trained()) if EXPERTS in name}
            state = gathering.keep_slices(state, shapes, ReplicaSlices([], self._ranks))
        kept = {key: apply_to_sample(torch.clone, value) for key, value in state.items() if key not in ("model", "cfg", "args")}
        state = {**state, **kept, "model": model}  # what is kept must not depend on the mapped file
        resume_between_same_batches(state, self.data_parallel_world_size)
        return state

    @property
    def checkpoint_suffix(self) -> str:
        """See Trainer; `-rank-N` with --sharded-checkpoints, where N is the rank's index in its group."""
        return super().checkpoint_suffix + (suffix(self._ranks.index) if self.sharded else "")

    @property
    def should_save_checkpoint_on_current_rank(self) -> bool:
        """See Trainer; with --sharded-checkpoints, every rank of the first group."""
        return self._ranks.first_group if self.sharded else super().should_save_checkpoint_on_current_rank

    @property
    def _ranks(self) -> ExpertGroup:
        assert self.expert_group is not None  # holds in every sharded run
        return self.expert_group

    def _expert_weights(self) -> Dict[str, Dict[str, Tensor]]:
        """This rank's expert parameters by name, in the model and in its copies (see layout)."""
        weights = {"model": {name: p for name, p in self.get_model().named_parameters() if hasattr(p, "expert")}}
        if self.cfg.ema.store_ema:
            averaged = dict(self.ema.get_model().named_parameters())
            weights["ema"] = {name: averaged[name] for name in weights["model"]}
            if self.cfg.ema.ema_fp32:
                weights["ema_fp32_params"] = {name: self.ema.fp32_params[name] for name in weights["model"]}
        return weights

    def _expert_indices(self) -> List[int]:
        """The indices of the experts' parameters in the optimizer, which has all trained parameters in this order."""
        return [index for index, (name, _) in enumerate(self._trained()) if EXPERTS in name]

    def _trained(self) -> List[Tuple[str, Tensor]]:
        """The names and parameters that are trained, in the optimizer's order."""
        named = chain(self.get_model().named_parameters(), self.get_criterion().named_parameters())
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]


def lock_existing(save_dir: str) -> None:
    """lock_folder, if fairseq has already created the folder."""
    if os.path.isdir(save_dir):
        lock_folder(save_dir)


def _first_words(error: BaseException) -> str:
    """The most informative line of an error; torch's list of mismatches starts with a heading."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[1] if len(lines) > 1 and lines[0].startswith("Error") else (lines or [""])[0]
    return f"{text}" if isinstance(error, (RuntimeError, AssertionError)) else f"{type(error).__name__}: {text}"


def start_average(state: Dict[str, Any]) -> Dict[str, Any]:
    """A checkpoint without an EMA with that of its model, at its first update.

    fairseq means to do the same, but looks for the model after it has deleted it.
    """
    extra = state.get("extra_state") or {}
    return state if "ema" in extra else {**state, "extra_state": {**extra, "ema": state["model"]}}


def resume_between_same_batches(state: Dict[str, Any], world_size: int) -> None:
    """Convert the position in the epoch, which fairseq counts in batches per rank, to `world_size` ranks."""
    position = (state.get("extra_state") or {}).get("train_iterator") or {}
    written_by = state["cfg"]["distributed_training"]["distributed_world_size"] if state.get("cfg") else world_size
    done = position.get("iterations_in_epoch", 0) * written_by
    if done and written_by != world_size:
        position["iterations_in_epoch"] = done // world_size
        if done % world_size:
            logger.warning("resuming on %d ranks repeats %d of %d batches of this epoch", world_size, done % world_size, done)
