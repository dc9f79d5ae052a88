"""Counts which experts each target language uses in a trained multilingual model.

Source sentences begin with a tag for the target language, such as `<2de>`. The model runs a split once in evaluation mode,
with the reference translation as the decoder's input, and the tokens of each expert are counted by language.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, Optional

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import MoELayer, named_moe_layers
from fairseq_sparsemixer.tools.sentences import load_model, translates

TAG = re.compile(r"<2(\w+)>")
MAX_TOKENS = 4096  # per batch
PREFIX = 2  # tokens: sentencepiece may put its word boundary in front of the tag


@dataclass(frozen=True)
class LanguageLoad:
    """Tokens by layer, language and expert: counts [L][N][E]. layers, languages: the L and N names."""

    layers: List[str]
    languages: List[str]
    counts: List[List[List[int]]]

    def shares(self) -> List[List[List[float]]]:
        """[L][N][E]: each expert's share of a language's tokens."""
        return [[[count / max(sum(row), 1) for count in row] for row in rows] for rows in self.counts]

    def information(self) -> List[float]:
        """[L]: the mutual information of language and expert in bits; 0 if all languages use the experts equally.

        At most log2 of the number of languages or of experts, whichever is smaller.
        """
        return [mutual_information(rows) for rows in self.counts]


def mutual_information(counts: List[List[int]]) -> float:
    """Mutual information of row and column of a table of counts, in bits: sum p(n, e) log2(p(n, e) / (p(n) p(e)))."""
    total = sum(map(sum, counts))
    rows, columns = [sum(row) for row in counts], [sum(column) for column in zip(*counts)]
    return sum(
        count / total * math.log2(count * total / (rows[n] * columns[e]))
        for n, row in enumerate(counts)
        for e, count in enumerate(row)
        if count
    )


def language_load(checkpoint: str, data_bin: Optional[str] = None, split: str = "test") -> LanguageLoad:
    """The load of every MoE layer of a translation model on a split of binarised data (default: of its training data).

    Raises ConfigurationError for unusable files, a model without experts, and sentences without a tag.
    """
    model, _, task = load_model(checkpoint, data_bin)
    model.float()
    layers = named_moe_layers(model)
    if not translates(model) or not layers:
        raise ConfigurationError(
            f"{checkpoint} is not a translation model with experts; train one with a --router other than dense"
        )
    counts: Dict[str, List[Tensor]] = defaultdict(
        lambda: [torch.zeros(layer.gate.num_experts, dtype=torch.long) for _, layer in layers]
    )
    for sample in batches(task, split):
        languages = sentence_languages(task, sample, checkpoint)
        run(model, sample)
        for index, (name, layer) in enumerate(layers):
            tokens = sample["net_input"]["prev_output_tokens" if name.startswith("decoder") else "src_tokens"]
            for language, load in zip(languages, sentence_loads(layer, *tokens.shape)):
                counts[language][index] += load
    names = sorted(counts)
    by_layer = [[counts[language][index].tolist() for language in names] for index in range(len(layers))]
    return LanguageLoad([name for name, _ in layers], names, by_layer)


def batches(task: Any, split: str) -> Iterator[Dict[str, Any]]:
    """fairseq's batches of a split, in one pass."""
    task.load_dataset(split)
    yield from task.get_batch_iterator(task.dataset(split), max_tokens=MAX_TOKENS).next_epoch_itr(shuffle=False)


@torch.no_grad()
def run(model: nn.Module, sample: Dict[str, Any]) -> None:
    """Run one forward pass; each layer then has its routing."""
    model(**sample["net_input"])


def sentence_languages(task: Any, sample: Dict[str, Any], checkpoint: str) -> List[str]:
    """[B]: the language of each sentence's tag. Raises ConfigurationError for a sentence without a tag."""
    dictionary, languages = task.source_dictionary, []
    for tokens in sample["net_input"]["src_tokens"]:
        words = [dictionary[token] for token in tokens[tokens != dictionary.pad()][:PREFIX].tolist()]
        tags = [match.group(1) for match in map(TAG.fullmatch, words) if match]
        if not tags:
            begins = f"a source sentence of the data of {checkpoint} begins with {' '.join(words)}"
            raise ConfigurationError(f"{begins}; begin it with a tag for its language, such as <2de>")
        languages.append(tags[0])
    return languages


def sentence_loads(layer: MoELayer, batch: int, length: int) -> Tensor:
    """[B, E]: each sentence's tokens per expert in the last forward pass, over B x T positions."""
    routing = layer.routing
    assert routing is not None
    expert = routing.expert_index[:, : routing.num_chosen]  # [T B, k]
    unrouted = routing.unrouted()
    ran = torch.ones_like(expert) if unrouted is None else (~unrouted[:, : routing.num_chosen]).long()
    expert, ran = (value.view(length, batch, -1).transpose(0, 1).reshape(batch, -1) for value in (expert, ran))  # [B, T k]
    return ran.new_zeros(batch, routing.num_experts).scatter_add_(1, expert, ran)
