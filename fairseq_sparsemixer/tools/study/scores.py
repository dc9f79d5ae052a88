"""The test score of one run, read from what fairseq-generate or fairseq-eval-lm printed."""

from pathlib import Path
from typing import Any, Dict, List

from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.generation import read_hypothesis, read_perplexity, read_sentences
from fairseq_sparsemixer.tools.study.grid import Test


def score(test: Test, output: Path) -> Dict[str, Any]:
    """{"score": number, ...}: sacreBLEU with its signature, or the perplexity. Raises ConfigurationError where there is none."""
    if test.metric == "bleu":
        hypotheses, references = read_hypotheses(output), read_references(test)
        if len(hypotheses) != len(references):
            raise ConfigurationError(
                f"{output} has {len(hypotheses)} hypotheses, and {test.reference} {len(references)} lines;"
                " give the reference of the data's test split, and --required-batch-size-multiple 1"
            )
        bleu = BLEU()
        value = bleu.corpus_score(hypotheses, [references]).score
        return {"score": round(value, 3), "signature": str(bleu.get_signature()), "sentences": len(references)}
    found = read_perplexity(output.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise ConfigurationError(f"{output} holds no perplexity; see what fairseq-eval-lm says there")
    bits, perplexity = found
    return {"score": perplexity, "bits": bits}


def read_hypotheses(output: Path) -> List[str]:
    """The detokenised hypotheses of fairseq-generate's output, in the order of the test set."""
    with output.open(encoding="utf-8", errors="replace") as lines:
        return [text for _, text in sorted(filter(None, map(read_hypothesis, lines)))]


def read_references(test: Test) -> List[str]:
    """The reference, a sentence a line."""
    assert test.reference is not None  # of every test by BLEU
    return read_sentences(test.reference)
