"""Small data for --smoke: part of the real text if available (session.real_text), otherwise text made from CLDR."""

from typing import Dict, List

from recipes.common.cldr import make_cldr
from recipes.common.corpus import Corpus, read_file
from recipes.common.session import real_text
from recipes.multi30k_en_de.raw_text import read_multi30k

SAYS = "a small part of the real text if available, otherwise text made from CLDR"


def small_corpus(sizes: Dict[str, int]) -> Corpus:
    """English-German pairs by split, from Multi30k or CLDR."""
    folder = real_text("multi30k")
    if folder is None:
        return make_cldr(sizes, seed=1)
    return {split: pairs[: sizes[split]] for split, pairs in read_multi30k(folder).items()}


def small_text() -> Dict[str, List[str]]:
    """English lines by split, from WikiText-2 or CLDR. Training uses WikiText-2's test part: its train part is too large."""
    folder = real_text("wikitext2")
    if folder is None:
        corpus = make_cldr({"train": 8000, "valid": 400, "test": 400}, seed=1)
        return {split: [pair.source for pair in pairs] for split, pairs in corpus.items()}
    held_out = list(read_file(folder / "valid.txt").lines)
    half = len(held_out) // 2
    return {"train": list(read_file(folder / "test.txt").lines), "valid": held_out[:half], "test": held_out[half:]}
