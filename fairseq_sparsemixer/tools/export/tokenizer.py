"""The tokenizer of a translation model that was trained on sentencepiece's pieces: MarianTokenizer of transformers.

It does what the preparation of fairseq's data does: sentencepiece splits a text, and a dictionary gives the pieces numbers,
with <unk> for those that it lacks, and </s> at the end. The dictionary is in vocab.json, in the order of dict.txt. Its
symbols that are not pieces, such as language tags, are kept whole where a text has them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List

from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import augment_dictionary

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.export.source import Export, Source

FILLER = "madeupword"  # fairseq's, which makes the dictionary's size a multiple of 8


@dataclass
class Texts:
    """The files of a language: its sentencepiece model and its dictionary."""

    pieces: str
    words: str


def tokenizer_files(export: Export, source: Source, texts: Texts, target: Texts) -> Dict[str, bytes]:
    """{name: content} of the tokenizer's files. target: of the other language, the same or its own.

    Raises ConfigurationError for files that do not belong to the model.
    """
    if not export.config.get("is_encoder_decoder"):
        raise ConfigurationError(f"--sentencepiece-model applies to translation models, not to {export.model}; leave it out")
    sizes = [int(export.config[name if name in export.config else "vocab_size"]) for name in ("src_vocab_size", "tgt_vocab_size")]
    own, other = texts, target
    vocabularies = [_vocabulary(own.words, source.task, sizes[0]), _vocabulary(other.words, source.task, sizes[1])]
    separate = vocabularies[0] != vocabularies[1]
    tags = _tags(own, vocabularies[0])
    if separate:
        _tags(other, vocabularies[1])
    settings: Dict[str, Any] = {
        "tokenizer_class": "MarianTokenizer",
        "unk_token": "<unk>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "source_lang": source.task.get("source_lang"),
        "target_lang": source.task.get("target_lang"),
        "separate_vocabs": separate,
        "model_max_length": export.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    if tags:
        settings["additional_special_tokens"] = tags
        settings["added_tokens_decoder"] = {str(vocabularies[0][tag]): _special(tag) for tag in tags}
    files = {
        "tokenizer_config.json": settings,
        "vocab.json": vocabularies[0],
        **({"target_vocab.json": vocabularies[1]} if separate else {}),
    }
    return {
        **{name: (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode() for name, content in files.items()},
        "source.spm": Path(own.pieces).read_bytes(),
        "target.spm": Path(other.pieces).read_bytes(),
    }


def _special(tag: str) -> Dict[str, Any]:
    return {"content": tag, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def _vocabulary(path: str, task: Dict[str, Any], size: int) -> Dict[str, int]:
    """{symbol: number} of a dictionary file, with the tags that the task adds. Raises ConfigurationError unless it has `size`."""
    try:
        words = Dictionary.load(path)
    except Exception as error:  # fairseq raises a plain Exception for a file that is not text
        raise ConfigurationError(f"{path} is not a dictionary ({error}); give the dict.txt of fairseq-preprocess") from None
    languages = task.get("langs")
    if task.get("_name", task.get("task")) == "translation_multi_simple_epoch" and languages:
        listed = languages.split(",") if isinstance(languages, str) else list(languages)
        specs = task.get("langtoks_specs") or ["main"]
        style = task.get("lang_tok_style") or "multilingual"
        augment_dictionary(words, listed, style, specs.split(",") if isinstance(specs, str) else specs, task.get("extra_data"))
    if len(words) != size:
        raise ConfigurationError(
            f"{path} has {len(words)} symbols, but the model's embeddings have {size}; give the dict.txt it was trained with,"
            " with the symbols that its task adds"
        )
    return {symbol: number for number, symbol in enumerate(words.symbols)}


def _tags(texts: Texts, vocabulary: Dict[str, int]) -> List[str]:
    """The symbols of a vocabulary that are not pieces. Raises ConfigurationError if most are not, or there is no model."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=texts.pieces)
    except (OSError, RuntimeError):
        raise ConfigurationError(f"{texts.pieces} is not a sentencepiece model; give one to --sentencepiece-model") from None
    pieces = {model.id_to_piece(number) for number in range(model.get_piece_size())}
    special = {"<s>", "<pad>", "</s>", "<unk>"}
    others = [word for word in vocabulary if word not in pieces | special and not word.startswith(FILLER)]
    if len(others) > len(vocabulary) // 2:
        raise ConfigurationError(
            f"{len(others)} of {len(vocabulary)} symbols of {texts.words} are not pieces of {texts.pieces}; give the model that"
            " split the training text"
        )
    return others
