"""The routes of a trace, by subset, layer and sentence, for --moe-replay. K: the most experts of a token of a layer."""

from dataclasses import dataclass, field
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.traces.files import read_lines

AGAIN = "trace the same data, with the same words"


class Arrays(NamedTuple):
    """A sentence of n tokens: expert_index, weight and ran [n, K]; ran is False beyond a token's experts."""

    expert_index: np.ndarray
    weight: np.ndarray
    ran: np.ndarray


@dataclass
class Sentence:
    """A sentence in one layer. updates: -1 outside training."""

    updates: int
    words: List[Optional[str]] = field(default_factory=list)
    experts: List[List[int]] = field(default_factory=list)
    weights: List[List[float]] = field(default_factory=list)
    arrays: Optional[Arrays] = None
    ids: Optional[np.ndarray] = None  # of the words, in the dictionary of the model

    def word_ids(self, dictionary) -> np.ndarray:
        """[n], -1 where the word is unknown."""
        if self.ids is None:
            self.ids = np.array([-1 if word is None else dictionary.index(word) for word in self.words])
        return self.ids

    def padded(self, width: int) -> Arrays:
        """The choices in K = width columns."""
        if self.arrays is None:
            shape = (len(self.words), width)
            made = Arrays(np.zeros(shape, np.int64), np.zeros(shape, np.float64), np.zeros(shape, bool))
            for place, (experts, weights) in enumerate(zip(self.experts, self.weights)):
                made.expert_index[place, : len(experts)] = experts
                made.weight[place, : len(experts)] = weights
                made.ran[place, : len(experts)] = True
            self.arrays = made
            self.experts, self.weights = [], []
        return self.arrays


@dataclass
class Layer:
    """The sentences of a layer in one subset. width: K. ragged: tokens have different numbers of experts."""

    sentences: Dict[int, Sentence] = field(default_factory=dict)
    width: int = 0
    ragged: bool = False
    largest: int = -1  # of the experts' numbers


class Columns(NamedTuple):
    """B sentences of at most n tokens: expert_index, weight, ran [B, n, K]; word_id [B, n]; length [B]."""

    expert_index: Tensor
    weight: Tensor
    ran: Tensor
    word_id: Tensor
    length: List[int]


class Replay:
    """The trace in a file. Raises ConfigurationError for an unusable one.

    Of a sentence that is there several times, as in the trace of a training, the one after the most updates counts, or the
    last one.
    """

    def __init__(self, path: str):
        self.path = path
        self.layers: Dict[Tuple[str, str], Layer] = {}
        for line in read_lines(path, "--moe-replay"):
            layer = self.layers.setdefault((line.subset, line.layer), Layer())
            sentence = layer.sentences.get(line.sentence)
            if sentence is not None and line.updates < sentence.updates:
                continue
            if sentence is None or line.position == 0 or line.updates > sentence.updates:
                sentence = layer.sentences[line.sentence] = Sentence(line.updates)
            if line.position != len(sentence.words):
                raise ConfigurationError(
                    f"--moe-replay {path} lacks position {len(sentence.words)} of sentence {line.sentence} of {line.subset} in"
                    f" {line.layer}; trace again"
                )
            sentence.words.append(line.word)
            sentence.experts.append(line.experts)
            sentence.weights.append(line.weights)
        for layer in self.layers.values():
            counts = {len(experts) for sentence in layer.sentences.values() for experts in sentence.experts}
            layer.width, layer.ragged = max(counts) or 1, len(counts) > 1 or 0 in counts
            layer.largest = max(
                (max(experts, default=-1) for sentence in layer.sentences.values() for experts in sentence.experts), default=-1
            )

    def covers(self, subset: str) -> bool:
        """Whether the trace has the subset."""
        return any(known == subset for known, _ in self.layers)

    def check_whole(self, subset: str) -> None:
        """Raise ConfigurationError if layers of the subset have other sentences, or the same after other updates.

        LayerDrop skips layers in training, so that a trace of it is not the routing of one model.
        """
        layers = [(name, layer.sentences) for (known, name), layer in self.layers.items() if known == subset]
        for name, sentences in layers[1:]:
            first, known = layers[0]
            for number in sorted(sentences.keys() | known.keys()):
                if number not in sentences or number not in known or sentences[number].updates != known[number].updates:
                    raise ConfigurationError(
                        f"--moe-replay {self.path} has sentence {number} of {subset} not after the same update in {first} and in"
                        f" {name}, as a training with LayerDrop leaves it; trace it with fairseq-validate --valid-subset {subset}"
                    )

    def check_layer(self, subset: str, name: str, num_experts: int) -> None:
        """Raise ConfigurationError if the trace lacks this layer of the subset, or if its experts do not fit."""
        layer = self.layers.get((subset, name))
        if layer is None:
            known = sorted({known for known, _ in self.layers})
            if subset not in known:
                raise ConfigurationError(
                    f"--moe-replay {self.path} has no subset {subset}, only {', '.join(known) or 'no lines'}"
                )
            layers = ", ".join(sorted(layer for known, layer in self.layers if known == subset))
            raise ConfigurationError(
                f"--moe-replay {self.path} has no layer {name}, only {layers}; trace a model with experts in the same layers"
            )
        if layer.largest >= num_experts:
            raise ConfigurationError(
                f"--moe-replay {self.path} names expert {layer.largest} in {name}, which has {num_experts} experts;"
                " trace a model with as many"
            )

    def sentence(self, subset: str, name: str, number: int) -> Sentence:
        """A sentence of a checked layer. Raises ConfigurationError if the trace lacks it."""
        found = self.layers[subset, name].sentences.get(number)
        if found is None:
            raise ConfigurationError(
                f"--moe-replay {self.path} has no sentence {number} of {subset} in {name}; trace the same data, with"
                " --required-batch-size-multiple 1, as fairseq's default of 8 can leave out sentences"
            )
        return found

    def columns(self, subset: str, name: str, numbers: List[int], dictionary) -> Columns:
        """These sentences of a checked layer. Raises ConfigurationError if the trace lacks one."""
        width = self.layers[subset, name].width
        sentences = [self.sentence(subset, name, number) for number in numbers]
        length = [len(sentence.words) for sentence in sentences]
        shape = (len(numbers), max(length, default=0) or 1)
        index, weight = torch.zeros(*shape, width, dtype=torch.int64), torch.zeros(*shape, width, dtype=torch.float64)
        ran, word_id = torch.zeros(*shape, width, dtype=torch.bool), torch.full(shape, -1, dtype=torch.int64)
        for row, sentence in enumerate(sentences):
            known = sentence.padded(width)
            for tensor, values in zip((index, weight, ran), known):
                tensor[row, : length[row]] = torch.from_numpy(values)
            word_id[row, : length[row]] = torch.from_numpy(sentence.word_ids(dictionary))
        return Columns(index, weight, ran, word_id, length)
