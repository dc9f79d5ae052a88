"""The test score of one run, read from what fairseq-generate or fairseq-eval-lm printed."""

import re
import struct
from pathlib import Path
from typing import Any, Dict, List, Set

from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.languages import TAG
from fairseq_sparsemixer.tools.generation import read_hypothesis, read_perplexity, read_sentences
from fairseq_sparsemixer.tools.study.grid import Test

MAGIC = b"MMIDIDX\x00\x00"  # of fairseq's MMapIndexedDataset
HEADER = struct.Struct("<9sQBQ")  # magic, version, type, number of sentences


def score(test: Test, output: Path) -> Dict[str, Any]:
    """{"score": number, ...}: sacreBLEU with its signature, or the perplexity. Raises ConfigurationError if there is none."""
    if test.metric == "bleu":
        hypotheses, references = read_translations(test, output), read_references(test)
        bleu = BLEU()
        value = bleu.corpus_score(hypotheses, [references]).score
        return {"score": round(value, 3), "signature": str(bleu.get_signature()), "sentences": len(references)}
    found = read_perplexity(output.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise ConfigurationError(f"{output} has no perplexity; see the output of fairseq-eval-lm there")
    bits, perplexity = found
    return {"score": perplexity, "bits": bits}


def read_hypotheses(output: Path) -> List[str]:
    """The detokenised hypotheses of fairseq-generate's output, in the order of the test set."""
    with output.open(encoding="utf-8", errors="replace") as lines:
        return [text for _, text in sorted(filter(None, map(read_hypothesis, lines)))]


def read_translations(test: Test, output: Path) -> List[str]:
    """As many hypotheses as there are references. Raises ConfigurationError for another number."""
    hypotheses, references = read_hypotheses(output), read_references(test)
    if len(hypotheses) != len(references):
        raise ConfigurationError(
            f"{output} has {len(hypotheses)} hypotheses, and {test.reference} {len(references)} lines;"
            " give the reference of the data's test split, and --required-batch-size-multiple 1"
        )
    return hypotheses


def read_references(test: Test) -> List[str]:
    """The reference, one sentence per line."""
    assert test.reference is not None  # every test by BLEU has one
    return read_sentences(test.reference)


def split_sizes(data: Path, name: str) -> Set[int]:
    """The numbers of sentences of a split in fairseq's data, as the headers of its index files say; empty without any.

    The files are test.idx of a language model, test.en-de.en.idx and test.en-de.de.idx of a translation.
    """
    found = set()
    files = re.compile(rf"{re.escape(name)}(\.[^.]+-[^.]+\.[^.]+)?\.idx")
    for path in filter(lambda path: files.fullmatch(path.name), data.iterdir()):
        with path.open("rb") as file:
            header = file.read(HEADER.size)
        if len(header) == HEADER.size and header.startswith(MAGIC):
            found.add(HEADER.unpack(header)[-1])
    return found


def read_languages(test: Test) -> List[str]:
    """The language of each sentence; empty if the test does not say. Raises ConfigurationError for a line without one."""
    if test.languages is None:
        return []
    return [_language(test.languages, number, line) for number, line in enumerate(read_sentences(test.languages), start=1)]


def _language(path: Path, number: int, line: str) -> str:
    """The language of `<2de> a tagged source sentence`, or of a line with a single word: `de`."""
    first, *rest = line.split() or [""]
    tag = TAG.fullmatch(first)
    if tag is None and (rest or not first):
        raise ConfigurationError(f"{path}, line {number} does not begin with a tag such as <2de>, nor is it a single word")
    return tag.group(1) if tag else first
