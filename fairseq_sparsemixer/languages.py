"""Language tokens of multilingual translation: which symbol of a dictionary stands for which language."""

import re
from typing import Any, Dict, List, NamedTuple, Optional

TAG = re.compile(r"<2([\w-]+)>")  # in front of a source sentence: the target language, such as <2de>


class LanguageTokens(NamedTuple):
    """{token: language} of the tokens that name the source's and the target's language; empty if none does.

    target_in_source: whether the target's token is in the source sentence; otherwise it is in the target sentence.
    """

    source: Dict[int, str]
    target: Dict[int, str]
    target_in_source: bool


def language_tokens(task: Any) -> LanguageTokens:
    """The language tokens of a fairseq translation task, from its settings or from the tags in its dictionary."""
    if hasattr(task, "data_manager") and hasattr(task, "langs"):
        return _of_data_manager(task)
    words = getattr(task, "source_dictionary", None)
    tags = {} if words is None else {token: match.group(1) for token, match in enumerate(map(tag_of, words.symbols)) if match}
    return LanguageTokens({}, tags, target_in_source=True)


def tag_of(symbol: str) -> Optional["re.Match[str]"]:
    """The match of a tag, with or without the word boundary of sentencepiece in front."""
    return TAG.fullmatch(symbol.lstrip("\u2581"))


def _of_data_manager(task: Any) -> LanguageTokens:
    """Of translation_multi_simple_epoch: --encoder-langtok src or tgt, --decoder-langtok."""
    in_source, in_target = task.args.langtoks["main"]
    manager = task.data_manager
    encoder: Dict[int, str] = {}
    if in_source:
        encoder = {manager.get_encoder_langtok(name, name, in_source): name for name in _known(task)}
    if in_target:
        decoder = {manager.get_decoder_langtok(name, in_target): name for name in _known(task)}
        return LanguageTokens(encoder if in_source == "src" else {}, decoder, target_in_source=False)
    if in_source == "tgt":
        return LanguageTokens({}, encoder, target_in_source=True)
    return LanguageTokens(encoder, {}, target_in_source=False)


def _known(task: Any) -> List[str]:
    """The languages of the task's pairs, in the order of --langs."""
    used = {name for pair in task.lang_pairs for name in pair.split("-")}
    return [name for name in task.langs if name in used]
