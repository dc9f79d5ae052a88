"""The test score of one run, read from what fairseq-generate or fairseq-eval-lm printed."""

import re
from pathlib import Path
from typing import Any, Dict, List

from sacrebleu.metrics import BLEU

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.study.spec import Test

HYPOTHESIS = re.compile(r"^D-(\d+)\t[^\t]*\t(.*)$")
PERPLEXITY = re.compile(r"Loss \(base 2\): ([\d.]+), Perplexity: ([\d.]+)")


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
    found = PERPLEXITY.search(output.read_text(encoding="utf-8", errors="replace"))
    if found is None:
        raise ConfigurationError(f"{output} holds no perplexity; see what fairseq-eval-lm says there")
    return {"score": float(found.group(2)), "bits": float(found.group(1))}


def read_hypotheses(output: Path) -> List[str]:
    """The detokenised hypotheses of fairseq-generate's output, in the order of the test set."""
    lines = map(HYPOTHESIS.match, output.read_text(encoding="utf-8", errors="replace").splitlines())
    return [text for _, text in sorted((int(line.group(1)), line.group(2)) for line in lines if line)]


def read_references(test: Test) -> List[str]:
    """The reference, a sentence a line."""
    return test.reference.read_text(encoding="utf-8").splitlines()
