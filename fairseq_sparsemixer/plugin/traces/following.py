"""Follows the layers of a model: records their routing into a trace, or replaces it by that of a trace.

A batch has B sentences, the columns of a layer's tokens [T, B]. In a step of beam search, a layer has one token for each of R
hypotheses, [1, R].
"""

import json
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.layer import MoELayer, named_moe_layers
from fairseq_sparsemixer.moe.tracing import Routes, follow_routes, read_choices, real_places
from fairseq_sparsemixer.plugin.traces.files import TraceWriter
from fairseq_sparsemixer.plugin.traces.replay import AGAIN, Columns, Replay

NO_JSON = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


class Following:
    """What the layers of a model should record or follow at the moment.

    sentences: the numbers of the sentences in the dataset, one a column; None: nothing is followed.
    prefix: in a step of beam search, the words [R, t + 1] of each hypothesis so far.
    """

    def __init__(self, trace: Optional[TraceWriter], replay: Optional[Replay], own_weights: bool = False):
        self.trace, self.replay, self.own_weights = trace, replay, own_weights
        self.subset = ""
        self.updates: Optional[int] = None
        self.training = False
        self.replaying = replay is not None
        self.recording = False
        self.sentences: Optional[List[int]] = None
        self.prefix: Optional[Tensor] = None
        self.numbers: Optional[Tensor] = None  # of the next batch's sentences, if the batch does not say
        self.layers: List[LayerFollower] = []
        self.checked: set = set()

    @property
    def flag(self) -> str:
        """The flag to name in errors."""
        return "--moe-trace" if self.trace is not None else "--moe-replay"

    def attach(self, model: nn.Module) -> None:
        """Follow the layers of this model, once. Raises ConfigurationError if it has none, or if the trace does not fit."""
        if self.layers and (not self.replaying or self.subset in self.checked):
            return
        layers = named_moe_layers(model)
        if not layers:
            raise ConfigurationError(f"{self.flag} is for models with experts, and this one has none; leave the flag out")
        if not self.layers:
            self.layers = [LayerFollower(self, name, layer, dictionary_of(model, layer)) for name, layer in layers]
        if self.replay is not None and self.replaying and self.subset not in self.checked:
            for name, layer in layers:
                self.replay.check_layer(self.subset, name, layer.gate.num_experts)
            self.replay.check_whole(self.subset)
            self.checked.add(self.subset)

    def detach(self) -> None:
        """Leave the layers alone, and finish the file."""
        for follower in self.layers:
            follower.layer.follower = None
        self.layers = []
        if self.trace is not None:
            self.trace.flush()

    def open_batch(self, sample: Dict[str, Any]) -> None:
        """The next forwards are of this sample. Raises ConfigurationError if it does not say which sentences it has."""
        if not torch.is_tensor(sample.get("id")):
            raise ConfigurationError(
                f"{self.flag} needs the sentences' numbers, which this task's batches lack; leave the flag out"
            )
        self.sentences = sample["id"].tolist()
        self.prefix = None

    def close_batch(self) -> None:
        """The next forwards are not followed."""
        self.sentences = self.prefix = None

    @contextmanager
    def recorded(self, yes: bool = True) -> Iterator[None]:
        """In this context, forwards are recorded, or not."""
        before, self.recording = self.recording, yes and self.trace is not None
        try:
            yield
        finally:
            self.recording = before


class LayerFollower:
    """The follower of one layer; see MoELayer."""

    def __init__(self, following: Following, name: str, layer: MoELayer, dictionary: Any):
        self.following, self.name, self.layer, self.dictionary = following, name, layer, dictionary
        self.words: Dict[int, str] = {}
        layer.follower = self

    def __call__(self, routing: Routing, tokens: Tensor, shape: Tuple[int, ...], token_ids: Optional[Tensor]) -> Routing:
        """The routing to use for tokens [S, M] of shape (T, B)."""
        following = self.following
        if following.sentences is None or self.layer.training != following.training:
            return routing
        if len(shape) != 2 or shape[1] != len(following.sentences):
            raise ConfigurationError(
                f"{following.flag} needs batches of one column for each sentence, and {self.name} sees"
                f" {tuple(shape)[1:]} for {len(following.sentences)} sentences; leave the flag out"
            )
        if following.replay is not None and following.replaying:
            routes = self.routes(following.replay, following.sentences, routing, shape, token_ids)
            routing = follow_routes(
                routing, routes, lambda index, skipped: self.layer.gate.weigh(self.layer.gate.logits(tokens), index, skipped)
            )
        counted_ahead = self.layer.training and not torch.is_grad_enabled()  # by --balance-scope update
        if following.recording and not self.layer.idle and not counted_ahead:
            following.trace.add(self.lines(routing, shape, token_ids))  # type: ignore[union-attr]  # recording needs a trace
        return routing

    def lines(self, routing: Routing, shape: Tuple[int, ...], token_ids: Optional[Tensor]) -> List[str]:
        """The trace's lines of a forward."""
        choices = read_choices(routing, shape, token_ids)
        following = self.following
        assert following.sentences is not None
        updates = "" if following.updates is None else f'"updates": {following.updates}, '
        start = f'{{"subset": {json.dumps(following.subset)}, {updates}"layer": "{self.name}", "sentence": '
        weights = choices.weight.numpy().astype("U32").tolist()  # the shortest digits that give the same number
        sentences = [following.sentences[column] for column in choices.column.tolist()]
        words = ["null"] * len(weights) if choices.token_id is None else map(self.word, choices.token_id.tolist())
        rows = zip(sentences, choices.position.tolist(), words, choices.expert_index.tolist(), weights, choices.ran.tolist())
        lines = []
        for sentence, position, word, experts, values, ran in rows:
            if not all(ran):
                experts = [expert for expert, there in zip(experts, ran) if there]
                values = [value for value, there in zip(values, ran) if there]
            numbers = ", ".join(NO_JSON.get(value, value) for value in values)
            lines.append(
                f'{start}{sentence}, "position": {position}, "word": {word}, "experts": {experts}, "weights": [{numbers}]}}\n'
            )
        return lines

    def word(self, token_id: int) -> str:
        """A word of the dictionary, as JSON."""
        if token_id not in self.words:
            self.words[token_id] = json.dumps(self.dictionary[token_id], ensure_ascii=False)
        return self.words[token_id]

    def routes(
        self, replay: Replay, sentences: List[int], routing: Routing, shape: Tuple[int, ...], token_ids: Optional[Tensor]
    ) -> Routes:
        """The routes of this forward over the sentences [B]. Raises ConfigurationError if the trace has others."""
        following, device = self.following, routing.expert_index.device
        layer = replay.layers[following.subset, self.name]
        if self.layer.idle:
            index = torch.zeros(shape[0] * shape[1], layer.width, dtype=torch.int64, device=device)
            return Routes(index, index.double(), torch.zeros_like(index, dtype=torch.bool) if layer.ragged else None)
        columns = replay.columns(following.subset, self.name, sentences, self.dictionary)
        if following.prefix is None:
            real = real_places(routing.padding_mask, shape, torch.device("cpu") if routing.padding_mask is None else device).cpu()
            self.check_words(replay, sentences, columns, real, token_ids)
            place, known = real.cumsum(0) - 1, None
        else:
            prefix = following.prefix.cpu()  # [R, t + 1]
            place = torch.full(tuple(shape), prefix.size(1) - 1)
            same = columns.word_id[:, : prefix.size(1)]
            longer = prefix.size(1) > same.size(1)  # than any traced one
            known = torch.zeros(len(prefix), dtype=torch.bool) if longer else same.eq(prefix).all(1)
        place = place.clamp(min=0, max=columns.word_id.size(1) - 1)  # [T, B]
        column = torch.arange(shape[1]).expand(*shape)
        index, weight, ran = (value[column, place].flatten(0, 1).to(device) for value in columns[:3])  # [S, K]
        return Routes(
            expert_index=index,
            weight=None if following.own_weights else weight,
            skipped=~ran if layer.ragged else None,
            known=None if known is None else known.to(device),
        )

    def check_words(
        self, replay: Replay, sentences: List[int], columns: Columns, real: Tensor, token_ids: Optional[Tensor]
    ) -> None:
        """Raise ConfigurationError if the sentences, real [T, B] and token_ids [T, B], are not those of the trace."""
        subset = self.following.subset
        for column, (here, there) in enumerate(zip(real.sum(0).tolist(), columns.length)):
            if here != there:
                raise ConfigurationError(
                    f"--moe-replay {replay.path}: sentence {sentences[column]} of {subset} has"
                    f" {there} tokens in {self.name} there, and {here} here; {AGAIN}"
                )
        if token_ids is None:
            return
        ids, real = token_ids.cpu().t(), real.t()  # [B, T]
        flat = torch.cat([columns.word_id[column, :length] for column, length in enumerate(columns.length)])
        wrong = (flat >= 0) & (flat != ids[real])
        if wrong.any():
            first = int(wrong.nonzero()[0])
            column = int(real.nonzero()[first, 0])
            number = sentences[column]
            start = sum(columns.length[:column])
            word = replay.sentence(subset, self.name, number).words[first - start]
            here = self.dictionary[int(ids[real][first])]
            raise ConfigurationError(
                f"--moe-replay {replay.path}: sentence {number} of {subset} has {word!r} at position"
                f" {first - start} of {self.name} there, and {here!r} here; {AGAIN}"
            )


def dictionary_of(model: nn.Module, layer: MoELayer) -> Any:
    """The dictionary of the encoder or decoder that has this layer."""
    owners = [part for part in model.modules() if hasattr(part, "dictionary") and layer in part.modules()]
    return owners[-1].dictionary
