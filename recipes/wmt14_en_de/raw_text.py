"""WMT'14 English-German in the organisers' format: archives of parallel text, and the test set in SGML."""

import re
from itertools import chain
from pathlib import Path
from typing import Iterator, List

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.corpus import LANGUAGES, Lines, Pair, read_member, read_pairs

# As in fairseq's examples/translation/prepare-wmt14en2de.sh --icml17: the training data of WMT'14.
URLS = {
    "training-parallel-europarl-v7.tgz": "http://statmt.org/wmt13/training-parallel-europarl-v7.tgz",
    "training-parallel-commoncrawl.tgz": "http://statmt.org/wmt13/training-parallel-commoncrawl.tgz",
    "training-parallel-nc-v9.tgz": "http://statmt.org/wmt14/training-parallel-nc-v9.tgz",
    "test-full.tgz": "http://statmt.org/wmt14/test-full.tgz",
}
SHA256 = {  # published by several users
    "training-parallel-europarl-v7.tgz": "0224c7c710c8a063dfd893b0cc0830202d61f4c75c17eb8e31836103d27d96e7",
    "training-parallel-commoncrawl.tgz": "c7a74e2ea01ac6c920123108627e35278d4ccb5701e15428ffa34de86fa3a9e5",
}
CORPORA = {
    "training-parallel-europarl-v7.tgz": "training/europarl-v7.de-en",
    "training-parallel-commoncrawl.tgz": "commoncrawl.de-en",
    "training-parallel-nc-v9.tgz": "training/news-commentary-v9.de-en",
}
TEST = ("test-full/newstest2014-deen-src.en.sgm", "test-full/newstest2014-deen-ref.de.sgm")
SEGMENT = re.compile(r'<seg id="?\d+"?>\s*(.*?)\s*</seg>')


def read_training(folder: Path) -> Iterator[Pair]:
    """All training pairs, corpus after corpus, empty lines included."""
    corpora = (
        read_pairs(*(read_member(folder, archive, f"{stem}.{language}") for language in LANGUAGES), may_be_empty=True)
        for archive, stem in CORPORA.items()
    )
    return chain.from_iterable(corpora)


def read_newstest2014(folder: Path) -> List[Pair]:
    """The test set: 3,003 pairs. Raises ConfigurationError, with file and line, if a segment is empty or missing."""
    return list(read_pairs(*(segments(read_member(folder, "test-full.tgz", member)) for member in TEST)))


def segments(sgml: Lines) -> Lines:
    """The text of the segments of an SGML or XML file, one segment per line."""
    found = [match.group(1) for line in sgml.lines for match in [SEGMENT.search(line)] if match]
    if not found:
        raise ConfigurationError(f"{sgml.name} has no line with <seg id=...>; fetch it again")
    return Lines(f"{sgml.name} (segments)", found)
