"""The dictionaries of a checkpoint, which has only their sizes, and those it is moved to."""

import os
from dataclasses import dataclass
from glob import escape, glob
from typing import Any, Dict, List, Optional

from fairseq.data import Dictionary

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict, in_form_of

SOURCE, TARGET = "source", "target"  # the sides of a translation; a model with one dictionary has SOURCE
WITHOUT_EXTRAS = ("translation", "language_modeling")  # tasks that add no symbol to the dictionary's file
MASK = "<mask>"  # added by the tasks below
WITH_MASK = ("masked_lm", "sentence_prediction", "denoising")
FLAGS = {SOURCE: "--source-dict", TARGET: "--target-dict"}


@dataclass
class Move:
    """old, new: the words by index. extra: rows at the end of the old tensors for symbols that the task adds, kept there.

    file: the new dictionary.
    """

    old: List[str]
    new: List[str]
    extra: int = 0
    file: str = ""

    @property
    def kept(self) -> List[str]:
        """The words that both have."""
        return sorted(set(self.old) & set(self.new))

    def origins(self) -> List[int]:
        """For each new row the old one, or -1."""
        index = {word: row for row, word in enumerate(self.old)}
        return [index.get(word, -1) for word in self.new] + [len(self.old) + row for row in range(self.extra)]


def read_dictionary(path: str) -> List[str]:
    """The words of a fairseq dictionary by index, special symbols included. Raises ConfigurationError."""
    try:
        return list(Dictionary.load(path).symbols)
    except FileNotFoundError:
        raise ConfigurationError(f"the dictionary {path} does not exist; give a dict.txt of fairseq-preprocess") from None
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is not a dictionary of fairseq ({reason}); give a dict.txt") from None


def plan(state: Dict[str, Any], side: str, rows: int, new: str, data: Optional[str]) -> Move:
    """The move of a side with that many rows to the dictionary file `new`; data: the folder of the old one.

    Raises ConfigurationError if the old one is not found or not the checkpoint's, and if the two share no word.
    """
    path = old_dictionary(state, side, data)
    old, words, task = read_dictionary(path), read_dictionary(new), str(_task(state).get("_name"))
    extra = rows - len(old)
    if extra < 0 or (extra and task in WITHOUT_EXTRAS):
        raise ConfigurationError(
            f"{path} has {len(old):,} words, but the checkpoint {rows:,}: it was trained with another dictionary;"
            " give the folder of that one with --data"
        )
    if extra and task in WITH_MASK and MASK not in old:
        old, words, extra = [*old, MASK], words if MASK in words else [*words, MASK], extra - 1
    chosen = Move(old, words, extra, new)
    if len(chosen.kept) <= Dictionary().nspecial:
        raise ConfigurationError(f"{new} shares no word with {path}; train another model")
    return chosen


def old_dictionary(state: Dict[str, Any], side: str, data: Optional[str]) -> str:
    """The file of a side's old dictionary, in `data` or in the folder that the checkpoint names.

    Raises ConfigurationError if there is none.
    """
    task = _task(state)
    folder = data if data is not None else str(task.get("data") or "").split(os.pathsep)[0]
    language = task.get("source_lang" if side == SOURCE else "target_lang")
    names = [f"dict.{language}.txt"] if language else []
    for path in (os.path.join(folder, name) for name in [*names, "dict.txt"]):
        if folder and os.path.isfile(path):
            return path
    languages = sorted(glob(os.path.join(escape(folder), "dict.*.txt"))) if folder else []  # multilingual tasks have equal ones
    if languages and all(read_dictionary(path) == read_dictionary(languages[0]) for path in languages):
        return languages[0]
    raise ConfigurationError(
        f"the checkpoint's dictionary {(names or ['dict.txt'])[0]} is not in {folder or 'a folder that it names'};"
        " give the folder of the data it was trained on with --data"
    )


def with_new_data(state: Dict[str, Any], moves: Dict[str, Optional[Move]]) -> Dict[str, Any]:
    """The moved checkpoint, with the folder of its new dictionaries as its data; none if fairseq would not find them there.

    moves: of each side of the model; None for a side that stays. The dictionaries of the old folder have other words.
    """
    files = [None if move is None else move.file for move in moves.values()]
    folders = {None if file is None else os.path.dirname(os.path.abspath(file)) for file in files}
    folder = folders.pop() if len(folders) == 1 else None
    moved = _with_data(state, folder or "")
    for side, file in zip(moves, files) if folder else ():
        try:
            found = read_dictionary(old_dictionary(moved, side, None))
        except ConfigurationError:
            return _with_data(state, "")
        if file is None or found != read_dictionary(file):
            return _with_data(state, "")
    return moved


def _with_data(state: Dict[str, Any], folder: str) -> Dict[str, Any]:
    task = (state.get("cfg") or {}).get("task") or state.get("args")
    if not task:
        return state
    new = in_form_of(task, {**as_dict(task), "data": folder})
    return {**state, "cfg": {**state["cfg"], "task": new}} if (state.get("cfg") or {}).get("task") else {**state, "args": new}


def _task(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of the checkpoint's task, as new and old fairseq write them."""
    task: Any = (state.get("cfg") or {}).get("task") or state.get("args") or {}
    values = as_dict(task)
    return {**values, "_name": values.get("_name") or values.get("task")}
