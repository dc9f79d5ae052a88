"""Counts the tokens of each expert by language, for --moe-load-languages; on the device, without synchronisation.

N languages or pairs, L layers, E experts, B sentences, T positions.
"""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.languages import language_tokens
from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.layer import MoELayer

KINDS = ("source", "target", "pair")
NO_LANGUAGE = ""


class SentenceLanguages:
    """Which language, or pair of languages, each sentence of a batch is of.

    kind: source, target or pair. names: of the N languages or pairs, and NO_LANGUAGE, last, for sentences without a language
    token. wanted_by: what needs it, for the error. Raises ConfigurationError for an unknown kind, and if no token tells.
    """

    def __init__(self, task: Any, kind: str, wanted_by: str):
        if kind not in KINDS:
            raise ConfigurationError(f"{wanted_by} is unknown; choose {', '.join(KINDS[:-1])} or {KINDS[-1]}")
        known = language_tokens(task)
        self.inputs: List[str] = []  # of net_input, one for each side
        self.tables: List[Tensor] = []  # [V] token -> language, one for each side
        sides = []
        for side in ("source", "target") if kind == "pair" else (kind,):
            tokens: Dict[int, str] = getattr(known, side)
            if not tokens:
                raise ConfigurationError(_untold(wanted_by, side))
            in_source = side == "source" or known.target_in_source
            self.inputs.append("src_tokens" if in_source else "prev_output_tokens")
            sides.append(sorted(set(tokens.values())))
            words = task.source_dictionary if in_source else task.target_dictionary
            self.tables.append(_table(tokens, sides[-1], len(words)))
        codes: Dict[str, Tuple[int, ...]] = {name: (index,) for index, name in enumerate(sides[0])}
        if kind == "pair":
            codes = {pair: tuple(map(list.index, sides, pair.split("-"))) for pair in task.lang_pairs}
        self.names = [*codes, NO_LANGUAGE]
        self.rows_of = torch.full([len(names) + 1 for names in sides], len(codes))  # language of each side -> row
        for row, code in enumerate(codes.values()):
            self.rows_of[code] = row

    def rows(self, sample: Dict[str, Any]) -> Tensor:
        """[B] int64: each sentence's index in names."""
        inputs = [sample["net_input"][name] for name in self.inputs]
        if self.rows_of.device != inputs[0].device:  # once
            self.rows_of, self.tables = self.rows_of.to(inputs[0].device), [table.to(inputs[0].device) for table in self.tables]
        unknown = [size - 1 for size in self.rows_of.shape]
        return self.rows_of[tuple(map(first_known, (t[tokens] for t, tokens in zip(self.tables, inputs)), unknown))]


def _untold(wanted_by: str, side: str) -> str:
    flags = "--encoder-langtok src" if side == "source" else "--decoder-langtok, or --encoder-langtok tgt"
    tags = "" if side == "source" else "; with --task translation, begin each source sentence with a tag such as <2de>"
    return (
        f"{wanted_by} needs a token for the {side} language in each sentence, and there is none:"
        f" with --task translation_multi_simple_epoch, train with {flags}{tags}"
    )


def _table(tokens: Dict[int, str], names: List[str], size: int) -> Tensor:
    """[size]: the index in names of each token's language; len(names) for other tokens."""
    rows = [len(names)] * size
    for token, name in tokens.items():
        rows[token] = names.index(name)
    return torch.tensor(rows)


def first_known(rows: Tensor, unknown: int) -> Tensor:
    """rows [B, T] -> [B]: the first value of each row that is not `unknown`, or `unknown`."""
    first = (rows != unknown).int().argmax(1, keepdim=True)
    return rows.gather(1, first).squeeze(1)


@torch.no_grad()
def sentence_loads(routing: Routing, batch: int, length: int) -> Tensor:
    """[B, E] int64: each sentence's tokens per expert, over B x T positions that the layer saw as T x B."""
    expert = routing.expert_index[:, : routing.num_chosen]  # [T B, k]
    unrouted = routing.unrouted()
    ran = torch.ones_like(expert) if unrouted is None else (~unrouted[:, : routing.num_chosen]).long()
    expert, ran = (value.view(length, batch, -1).transpose(0, 1).reshape(batch, -1) for value in (expert, ran))  # [B, T k]
    return ran.new_zeros(batch, routing.num_experts).scatter_add_(1, expert, ran)


def _layer_tokens(name: str, inputs: Dict[str, Any]) -> Tensor:
    """The tokens [B, T] of net_input that pass through this layer."""
    return inputs["prev_output_tokens" if name.startswith("decoder") and "prev_output_tokens" in inputs else "src_tokens"]


@torch.no_grad()
def language_load(layers: List[Tuple[str, MoELayer]], languages: SentenceLanguages, sample: Dict[str, Any]) -> Tensor:
    """[L, N + 1, E] float64: the tokens of each expert by layer and row of `languages`; zeros beyond a layer's experts.

    A layer that did not run (LayerDrop) has zeros.
    """
    rows = languages.rows(sample)  # [B]
    most = max(layer.gate.num_experts for _, layer in layers)
    load = torch.zeros(len(layers), len(languages.names), most, dtype=torch.float64, device=rows.device)
    for index, (name, layer) in enumerate(layers):
        if layer.routing is not None:
            tokens = _layer_tokens(name, sample["net_input"])
            counts = sentence_loads(layer.routing, *tokens.shape).double()
            load[index, :, : counts.size(1)].index_add_(0, rows, counts)
    return load
