"""Counts which experts each language uses in a trained multilingual model.

Sentences name their language in a token: a tag such as `<2de>` in front of the source, or the tokens of fairseq's
translation_multi_simple_epoch. The model runs a split once in evaluation mode, with the reference translation as the
decoder's input, and the tokens of each expert are counted by language.
"""

from typing import Any, Dict, Iterator, Optional

import torch
from fairseq_sparsemixer.criterions.language_load import NO_LANGUAGE, SentenceLanguages
from fairseq_sparsemixer.criterions.language_load import language_load as load_of_batch
from torch import nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.tools.language_table import LanguageLoad, mutual_information
from fairseq_sparsemixer.tools.sentences import load_model, translates

__all__ = ["LanguageLoad", "language_load", "mutual_information"]

MAX_TOKENS = 4096  # per batch


def language_load(checkpoint: str, data_bin: Optional[str] = None, split: str = "test", kind: str = "target") -> LanguageLoad:
    """The load of every MoE layer of a translation model on a split of binarised data (default: of its training data).

    kind: count by source language, target language or pair. Raises ConfigurationError for unusable files, a model without
    experts, and sentences that do not name their language.
    """
    model, _, task = load_model(checkpoint, data_bin)
    return load_of_model(model, task, checkpoint, split, kind)


def load_of_model(model: nn.Module, task: Any, checkpoint: str, split: str = "test", kind: str = "target") -> LanguageLoad:
    """language_load of a model that is loaded already, which becomes one in float32; checkpoint: for errors."""
    model.float()
    layers = named_moe_layers(model)
    if not translates(model) or not layers:
        raise ConfigurationError(
            f"{checkpoint} is not a translation model with experts; train one with a --router other than dense"
        )
    languages = SentenceLanguages(task, kind, f"the load of {checkpoint} by {kind}")
    total: Any = 0
    for sample in batches(task, split):
        run(model, sample)
        total = total + load_of_batch(layers, languages, sample)
    counts = total.long().tolist()  # [L][N + 1][E]
    if any(sum(rows[languages.names.index(NO_LANGUAGE)]) for rows in counts):
        raise ConfigurationError(
            f"a sentence of the data of {checkpoint} does not name its {kind} language;"
            " for a source sentence, begin it with a tag for its language, such as <2de>"
        )
    seen = sorted((name, row) for row, name in enumerate(languages.names) if any(sum(rows[row]) for rows in counts))
    sizes = [layer.gate.num_experts for _, layer in layers]
    by_layer = [[rows[row][:size] for _, row in seen] for rows, size in zip(counts, sizes)]
    return LanguageLoad([name for name, _ in layers], [name for name, _ in seen], by_layer)


def batches(task: Any, split: str) -> Iterator[Dict[str, Any]]:
    """fairseq's batches of a split, in one pass."""
    task.load_dataset(split)
    yield from task.get_batch_iterator(task.dataset(split), max_tokens=MAX_TOKENS).next_epoch_itr(shuffle=False)


@torch.no_grad()
def run(model: nn.Module, sample: Dict[str, Any]) -> None:
    """Run one forward pass; each layer then has its routing."""
    model(**sample["net_input"])
