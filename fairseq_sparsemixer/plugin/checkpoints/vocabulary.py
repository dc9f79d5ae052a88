"""Moves a checkpoint to another dictionary: the embeddings and output rows of words that both have go with the word.

A new word starts as fairseq initialises one. V words, D the width of the embeddings.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.dictionaries import FLAGS, SOURCE, TARGET, Move, plan, with_new_data
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, refuse_one_of_several
from fairseq_sparsemixer.plugin.checkpoints.model_settings import model_settings
from fairseq_sparsemixer.plugin.models.fast_path import without_copies

BERT_STD = 0.02  # of BERT, RoBERTa and ELECTRA: fairseq's init_bert_params


def like_transformer(rows: Tensor) -> None:
    """Rows [N, D], as fairseq's Embedding and untied output projections: a normal distribution of std D^-0.5."""
    nn.init.normal_(rows, std=rows.size(1) ** -0.5)


def like_bert(rows: Tensor) -> None:
    """Rows [N, D] of RoBERTa's and ELECTRA's embeddings."""
    nn.init.normal_(rows, std=BERT_STD)


def like_linear(rows: Tensor) -> None:
    """Rows [N, D] of an untied RobertaLMHead, which is an nn.Linear."""
    nn.init.uniform_(rows, -(rows.size(1) ** -0.5), rows.size(1) ** -0.5)


class Rows(NamedTuple):
    """A tensor with a row for each word: the side of the translation, and how fairseq initialises a row."""

    name: str
    side: str
    initialise: Callable[[Tensor], Any]


# The first that matches; a tensor that is tied to one above goes with it.
TENSORS = (
    Rows(r"encoder\.embed_tokens\.weight", SOURCE, like_transformer),
    Rows(r"decoder\.(embed_tokens|output_projection)\.weight", TARGET, like_transformer),
    Rows(r"(encoder|generator)\.sentence_encoder\.embed_tokens\.(shared\.tokens\.)?weight", SOURCE, like_bert),
    Rows(r"(encoder|generator)\.lm_head\.weight", SOURCE, like_linear),
    Rows(r"(encoder|generator)\.lm_head\.bias", SOURCE, nn.init.zeros_),
)
ADAPTIVE = re.compile(r".*(adaptive_softmax|embed_tokens\.embeddings)\..*")
OF_NO_WORDS = re.compile(r".*(\.layers\.|positions|\.dense\.|layer_?norm|classification_heads).*")


@dataclass
class Moved:
    """The new checkpoint; for each side, how many words were kept, new and lost; notes."""

    state: Dict[str, Any]
    words: Dict[str, Dict[str, int]]
    notes: List[str] = field(default_factory=list)


def move(state: Dict[str, Any], moves: Dict[str, Move], seed: int = 1) -> Moved:
    """A checkpoint -> the same on other dictionaries, by side, without optimizer state; a model of one side takes SOURCE.

    Rows of new words are drawn from `seed`, tensor by tensor in the order of the file. Raises ConfigurationError for models
    that tie a word to its number.
    """
    refuse_one_of_several(state)
    model = without_copies(state["model"])
    if model_settings(state).get("router") == "hash":
        raise ConfigurationError("the checkpoint has --router hash, which routes by the word's number in its dictionary")
    sides = sides_of(state)
    both = sides == (SOURCE, TARGET)
    named = with_new_data(state, {side: moves.get(side) for side in sides})
    result = {**named, "model": _move_model(model, moves, both, seed), "last_optimizer_state": None}
    extra = state.get("extra_state") or {}
    copies = {key: _move_model(without_copies(extra[key]), moves, both, seed) for key in COPIES_OF_MODEL if key in extra}
    result["extra_state"] = {**extra, **copies}
    return Moved(result, {side: _counts(each) for side, each in moves.items()}, _notes(moves))


def plan_moves(
    state: Dict[str, Any], both: Optional[str], source: Optional[str], target: Optional[str], data: Optional[str]
) -> Dict[str, Move]:
    """The moves by side to the dictionary files of --dict, --source-dict and --target-dict; data: see `plan`.

    Raises ConfigurationError for flags that contradict each other or the model.
    """
    sides, named = sides_of(state), {SOURCE: source, TARGET: target}
    given = [f"{FLAGS[side]} {path}" for side, path in named.items() if path is not None]
    if given and both is not None:
        raise ConfigurationError(f"{given[0]} and --dict {both} both name a dictionary; give one of the two")
    if given and len(sides) == 1:
        raise ConfigurationError(f"{given[0]} is for a translation model with embeddings of each side; give --dict")
    chosen = {side: named[side] if both is None else both for side in sides}
    return {side: plan(state, side, count_rows(state, side), path, data) for side, path in chosen.items() if path is not None}


def sides_of(state: Dict[str, Any]) -> Tuple[str, ...]:
    """The sides with words of their own: both, or SOURCE for a model with one dictionary. Raises ConfigurationError."""
    names = state["model"]
    adaptive = next((name for name in names if ADAPTIVE.fullmatch(name)), None)
    if adaptive is not None:
        raise ConfigurationError(
            f"the checkpoint has {adaptive}: adaptive inputs and softmax keep words by frequency, in rows of several widths,"
            " which cannot be moved; train another model"
        )
    found = {rows.side for name in names for rows in [rows_of(name)] if rows}
    if not found:
        raise ConfigurationError("the checkpoint has no embeddings of words that convert --dict knows; it takes transformers")
    if found == {SOURCE, TARGET} and not model_settings(state).get("share_all_embeddings"):
        return SOURCE, TARGET
    return (SOURCE,)


def count_rows(state: Dict[str, Any], side: str) -> int:
    """V of the side. Raises ConfigurationError where its tensors differ, as with --output-dictionary-size."""
    one = len(sides_of(state)) == 1
    each = ((name, value.size(0), rows_of(name)) for name, value in state["model"].items())
    found = {name: count for name, count, rows in each if rows and (one or rows.side == side)}
    if len(set(found.values())) > 1:
        counts = ", ".join(f"{name} {count:,}" for name, count in found.items())
        raise ConfigurationError(f"the checkpoint has different numbers of words in its tensors ({counts}); it cannot be moved")
    return next(iter(found.values()))


def rows_of(name: str) -> Optional[Rows]:
    """The entry of TENSORS for this tensor; None if it has no rows of words."""
    return next((rows for rows in TENSORS if re.fullmatch(rows.name, name)), None)


def _move_model(weights: Dict[str, Tensor], moves: Dict[str, Move], both: bool, seed: int) -> Dict[str, Tensor]:
    done: Dict[Any, Tensor] = {}
    result = dict(weights)
    sizes = {len(each.old) + each.extra for each in moves.values()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, value in weights.items():
            rows = rows_of(name)
            if rows is None:
                if value.dim() and value.size(0) in sizes and not OF_NO_WORDS.fullmatch(name):
                    raise ConfigurationError(f"the checkpoint has {name} with a row per word, which convert --dict does not know")
                continue
            chosen = moves.get(rows.side if both else SOURCE)
            if chosen is not None:
                key = (value.data_ptr(), value.shape)
                if key not in done:
                    done[key] = _move_rows(value, chosen, rows.initialise)
                result[name] = done[key]
    return result


def _move_rows(value: Tensor, chosen: Move, initialise: Callable[[Tensor], Any]) -> Tensor:
    """value [V, ...] -> [V', ...]: rows of known words copied, the others initialised."""
    origins = torch.tensor(chosen.origins())
    moved = value.new_empty(len(origins), *value.shape[1:])
    known = origins >= 0
    fresh = torch.empty(int((~known).sum()), *value.shape[1:])
    if len(fresh):
        initialise(fresh)
    moved[known], moved[~known] = value[origins[known]], fresh.to(value.dtype)
    return moved


def _counts(chosen: Move) -> Dict[str, int]:
    kept = len(chosen.kept)
    return {"kept": kept, "new": len(chosen.new) - kept, "lost": len(chosen.old) - kept}


def _notes(moves: Dict[str, Move]) -> List[str]:
    return [
        f"{side}: the last {each.extra} rows, of symbols that the task adds to the dictionary, stay at the end"
        for side, each in moves.items()
        if each.extra
    ]
