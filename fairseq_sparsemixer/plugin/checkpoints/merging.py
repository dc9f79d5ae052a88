"""Merges the low-rank adapters of a checkpoint's experts into their weights: W + s A B (arXiv 2106.09685, section 4.1)."""

import copy
from typing import Any, Dict, List

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.lora import PARTS, A, B, merged, scale_of
from fairseq_sparsemixer.names import ADAPTERS, EXPERTS
from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, LAYOUT, files_of, layout_of, number_of_save
from fairseq_sparsemixer.plugin.checkpoints.model_settings import model_settings
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for
from fairseq_sparsemixer.plugin.checkpoints.resharding import read_any
from fairseq_sparsemixer.plugin.checkpoints.writing import refuse_special_target, require_targets, save_together

SETTINGS = ("expert_lora_rank", "expert_lora_alpha")


def merge_lora(source: str, target: str) -> int:
    """Write the checkpoint `source` as `target`, in its layout, with plain experts that compute the same.

    The optimizer state is left out, since it is that of the adapters; an EMA is merged, too. Returns the number of merged
    tensors in the model. Raises ConfigurationError for a checkpoint without adapters.
    """
    refuse_special_target(target)
    states, read = read_any(source)
    with one_sentence_for(source):
        if not any(ADAPTERS in name for name in states[0]["model"]):
            raise ConfigurationError(f"{source} has no adapters of experts to merge; use it as it is")
    size = len(states)
    written = files_of(target, size)
    require_targets(written, read)
    save = number_of_save(size)

    def state_of(index: int) -> Dict[str, Any]:
        with one_sentence_for(source):
            return {**without_adapters(states[index]), LAYOUT: {**layout_of(states[index]), "save": save, "optimizer": None}}

    with writing_checkpoints(written):
        save_together(written, state_of)
    return sum(ADAPTERS in name for name in states[0]["model"]) // 2


def without_adapters(state: Dict[str, Any]) -> Dict[str, Any]:
    """A checkpoint of the same function without adapters and optimizer state."""
    settings = model_settings(state)
    scale = scale_of(settings["expert_lora_rank"], settings.get("expert_lora_alpha"))
    extra = state.get("extra_state") or {}
    copies = {key: _merge(extra[key], scale) for key in COPIES_OF_MODEL if key in extra}
    result = {**state, "model": _merge(state["model"], scale), "extra_state": {**extra, **copies}, "last_optimizer_state": None}
    for key in ("cfg", "args"):
        result[key] = _unset(state.get(key))
    return result


def refuse_adapters(state: Dict[str, Any]) -> None:
    """Raise ConfigurationError if a checkpoint's experts have adapters, for code that knows plain experts only."""
    if any(ADAPTERS in name for name in state["model"]):
        raise ConfigurationError(
            "the checkpoint has adapters of experts; merge them first: fairseq-sparsemixer convert --merge-lora IN OUT"
        )


def refuse_other_scale(state: Dict[str, Any], filename: str, cfg: Any) -> None:
    """Raise ConfigurationError if a run would multiply a checkpoint's adapters by another factor, and so compute otherwise."""
    theirs, rank = model_settings(state), getattr(cfg, "expert_lora_rank", None)
    if rank is None or theirs.get("expert_lora_rank") != rank:  # loading.py says what fits
        return
    alphas = theirs.get("expert_lora_alpha"), cfg.expert_lora_alpha
    found, own = (float(rank) if alpha is None else float(alpha) for alpha in alphas)
    if found != own:
        raise ConfigurationError(
            f"{filename} has adapters for --expert-lora-alpha {found:g}, but this run has {own:g}; give --expert-lora-alpha"
            f" {found:g}, or merge them into the experts: fairseq-sparsemixer convert --merge-lora IN OUT"
        )


def _merge(weights: Dict[str, Tensor], scale: float) -> Dict[str, Tensor]:
    result = copy.copy(weights)  # with torch's metadata
    for name in [name for name in weights if ADAPTERS in name]:
        del result[name]
    layers: List[str] = sorted({name.split(ADAPTERS)[0] for name in weights if ADAPTERS in name})
    for layer in layers:
        for part in PARTS:
            weight, *factors = (weights[f"{layer}{EXPERTS}{name.format(part)}"] for name in ("weight_{}", A, B))
            wide = torch.promote_types(weight.dtype, torch.float32)
            whole = merged(weight.to(wide), factors[0].to(wide), factors[1].to(wide), scale)
            result[f"{layer}{EXPERTS}weight_{part}"] = whole.to(weight.dtype)
    return result


def _unset(settings: Any) -> Any:
    """Settings without those of adapters: a model's, or those of a whole run with its model's."""
    if settings is None:
        return None
    changed = copy.copy(settings)
    named = changed if isinstance(changed, dict) else vars(changed)
    named.update({name: None for name in SETTINGS if name in named})
    if "model" in named and not isinstance(named["model"], str):
        named["model"] = _unset(named["model"])
    return changed
