"""Loads a trained model and the sentences to run it on, for inspect and fidelity."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for
from fairseq_sparsemixer.tools.generation import read_sentences


def read_pairs(text: str, target: str) -> List[Tuple[str, str]]:
    """Pairs of lines. Raises ConfigurationError for files that are missing, empty, not UTF-8, or of unequal length."""
    sides = []
    for flag, path in (("--text", text), ("--target", target)):
        try:
            sides.append(read_sentences(Path(path)))
        except ConfigurationError as error:
            raise ConfigurationError(f"{flag} {error.message}") from None
    if len(sides[0]) != len(sides[1]):
        lengths = f"--text {text} has {len(sides[0])} lines, but --target {target} has {len(sides[1])}"
        raise ConfigurationError(f"{lengths}; give files of paired lines")
    pairs = [(source, translation) for source, translation in zip(*sides) if source.strip() and translation.strip()]
    if not pairs:
        raise ConfigurationError(f"--text {text} and --target {target} have no sentence pair; give other files")
    return pairs


def load_model(checkpoint: str, data_bin: Optional[str]) -> Tuple[nn.Module, nn.Module, Any]:
    """(model in float64 and eval mode, its training criterion, task). Raises ConfigurationError."""
    overrides = {} if data_bin is None else {"data": str(data_bin)}
    with one_sentence_for(checkpoint):
        state = checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint), overrides)
    try:
        models, cfg, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)], overrides, state=state)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"{checkpoint} needs the dictionaries it was trained with ({error}); give their folder with --data-bin"
        ) from None
    if not cfg.criterion:
        raise ConfigurationError(f"{checkpoint} names no criterion in its settings; give a checkpoint that fairseq-train wrote")
    for name in ("moe_load_file", "moe_load_languages"):
        if name in cfg.criterion:
            cfg.criterion[name] = None
    return models[0].double().eval().requires_grad_(False), task.build_criterion(cfg.criterion), task


def translates(model: nn.Module) -> bool:
    """Whether the model has a source and a target."""
    return hasattr(model, "encoder") and hasattr(model, "decoder")


def make_sample(task: Any, source_line: str, target_line: str) -> Dict[str, Any]:
    """A fairseq translation batch of one sentence."""
    source = task.source_dictionary.encode_line(source_line, add_if_not_exist=False).long().unsqueeze(0)
    target = task.target_dictionary.encode_line(target_line, add_if_not_exist=False).long().unsqueeze(0)
    return {
        "net_input": {
            "src_tokens": source,
            "src_lengths": torch.tensor([source.size(1)]),
            "prev_output_tokens": target.roll(1, dims=1),  # end of sentence first
        },
        "target": target,
        "ntokens": target.numel(),
    }
