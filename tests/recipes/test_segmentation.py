"""Pieces learnt from text that has too few, or too many kinds of, letters."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.segmentation import learn_pieces


@pytest.mark.parametrize("text, vocabulary, reason", [("abc def\n", 3, "Vocabulary size is smaller"), ("\n", 100, "sentences_")])
def test_text_that_makes_no_vocabulary_is_named(text, vocabulary, reason, tmp_path):
    (tmp_path / "train.en").write_text(text * 10)
    claim = f"no vocabulary of {vocabulary} pieces can be learnt from .*train.en .*{reason}.*; give more pieces"
    with pytest.raises(ConfigurationError, match=claim):
        learn_pieces([tmp_path / "train.en"], tmp_path / "pieces", vocabulary, "bpe")
