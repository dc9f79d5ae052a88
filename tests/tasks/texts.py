"""Random text in fairseq's binary format."""

from pathlib import Path
from random import Random
from typing import List

import torch

WORDS = [f"w{index}" for index in range(20)]


def draw_sentences(count: int, seed: int = 1, shortest: int = 2, longest: int = 5) -> List[List[str]]:
    """Sentences of random words."""
    draw = Random(seed)
    return [draw.choices(WORDS, k=draw.randint(shortest, longest)) for _ in range(count)]


def write_dictionary(path: Path):
    """Write the dictionary of WORDS in fairseq's format. Returns it."""
    from fairseq.data import Dictionary

    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    path.parent.mkdir(parents=True, exist_ok=True)
    dictionary.save(str(path))
    return dictionary


def write_sentences(path: Path, sentences: List[List[str]], dictionary) -> None:
    """Write path.bin and path.idx, with </s> after each sentence."""
    from fairseq.data import indexed_dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    builder = indexed_dataset.make_builder(f"{path}.bin", "mmap", len(dictionary))
    for sentence in sentences:
        builder.add_item(torch.IntTensor([*map(dictionary.index, sentence), dictionary.eos()]))
    builder.finalize(f"{path}.idx")
