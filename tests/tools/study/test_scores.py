"""The test score of a run, from the output of fairseq's programs."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.scores import score
from fairseq_sparsemixer.tools.study.spec import Test as Scoring  # a name that pytest does not collect


def test_the_score_of_a_language_model_is_the_perplexity_of_fairseq_eval_lm(tmp_path):
    output = tmp_path / "test.txt"
    output.write_text("2026 | INFO | Evaluated 9 tokens\n2026 | INFO | Loss (base 2): 5.0000, Perplexity: 32.00\n")
    assert score(Scoring("perplexity"), output) == {"score": 32.0, "bits": 5.0}
    output.write_text("killed\n")
    with pytest.raises(ConfigurationError, match="test.txt has no perplexity"):
        score(Scoring("perplexity"), output)


def test_hypotheses_are_sorted_and_must_match_the_number_of_references(tmp_path):
    output, reference = tmp_path / "test.txt", tmp_path / "test.de"
    sentences = ["ein Hund läuft durch den Park", "zwei Kinder spielen am Strand"]
    reference.write_text("".join(f"{sentence}\n" for sentence in sentences), encoding="utf-8")
    output.write_text("".join(f"S-{i}\tx\nD-{i}\t-0.5\t{sentences[i]}\n" for i in (1, 0)), encoding="utf-8")
    result = score(Scoring("bleu", reference), output)
    assert result["score"] == pytest.approx(100) and result["sentences"] == 2 and "tok:13a" in result["signature"]
    output.write_text(f"D-0\t-0.5\t{sentences[0]}\n", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="1 hypotheses, and .*test.de 2 lines; .*--required-batch-size-multiple 1"):
        score(Scoring("bleu", reference), output)
