"""Which words go to which expert, by a trace (--moe-trace): the loads of each layer, and the words typical of each expert."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.traces.files import read_lines

UNKNOWN = "(no word)"  # of a trace without words


@dataclass(frozen=True)
class WordReport:
    """count: the word's tokens that the expert ran for. share: these by all tokens of the word in the layer."""

    word: str
    count: int
    share: float


@dataclass(frozen=True)
class ExpertReport:
    """tokens: that the expert ran for. share: these by all tokens of the layer. weight: the mean of their weights.

    by_count: the words with the most tokens. by_share: the words with the largest share, of those that are frequent enough.
    """

    expert: int
    tokens: int
    share: float
    weight: float
    by_count: List[WordReport]
    by_share: List[WordReport]


@dataclass(frozen=True)
class TraceLayerReport:
    """tokens: of the layer. words: different words among them. Experts that no token chose are left out."""

    layer: str
    tokens: int
    words: int
    experts: List[ExpertReport]


@dataclass
class _Counts:
    tokens: Counter = field(default_factory=Counter)  # by word
    pairs: Dict[int, Counter] = field(default_factory=dict)  # by expert and word
    weights: Dict[int, float] = field(default_factory=dict)  # sums


def report_trace(path: str, num_words: int = 10, min_count: int = 5) -> List[TraceLayerReport]:
    """A report of each layer, with num_words words of each expert; by_share has words of at least min_count tokens.

    Reads the file line by line. Raises ConfigurationError for an unusable file, and for one without lines.
    """
    layers: Dict[str, _Counts] = {}
    for line in read_lines(path, "--trace"):
        counts = layers.setdefault(line.layer, _Counts())
        word = UNKNOWN if line.word is None else line.word
        counts.tokens[word] += 1
        for expert, weight in zip(line.experts, line.weights):
            counts.pairs.setdefault(expert, Counter())[word] += 1
            counts.weights[expert] = counts.weights.get(expert, 0.0) + weight
    if not layers:
        raise ConfigurationError(f"--trace {path} has no lines; trace a run that sees at least one sentence")
    return [_layer_report(name, layers[name], num_words, min_count) for name in layers]


def _layer_report(name: str, counts: _Counts, num_words: int, min_count: int) -> TraceLayerReport:
    total = sum(counts.tokens.values())
    experts = []
    for expert in sorted(counts.pairs):
        words = [WordReport(word, count, count / counts.tokens[word]) for word, count in counts.pairs[expert].items()]
        frequent = [word for word in words if counts.tokens[word.word] >= min_count]
        tokens = sum(counts.pairs[expert].values())
        experts.append(
            ExpertReport(
                expert=expert,
                tokens=tokens,
                share=tokens / total,
                weight=counts.weights[expert] / tokens,
                by_count=sorted(words, key=_most_first)[:num_words],
                by_share=sorted(frequent, key=_purest_first)[:num_words],
            )
        )
    return TraceLayerReport(name, total, len(counts.tokens), experts)


def _most_first(word: WordReport) -> Tuple[int, str]:
    return -word.count, word.word


def _purest_first(word: WordReport) -> Tuple[float, int, str]:
    return -word.share, -word.count, word.word
