"""Errors from learning pieces on text with too few, or too many different, letters."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.segmentation import learn_pieces


@pytest.mark.parametrize("text, vocabulary, reason", [("abc def\n", 3, "Vocabulary size is smaller"), ("\n", 100, "sentences_")])
def test_an_unlearnable_vocabulary_is_reported_with_file_and_reason(text, vocabulary, reason, tmp_path):
    (tmp_path / "train.en").write_text(text * 10)
    claim = f"cannot learn {vocabulary} pieces from .*train.en .*{reason}.*; use more pieces"
    with pytest.raises(ConfigurationError, match=claim):
        learn_pieces([tmp_path / "train.en"], tmp_path / "pieces", vocabulary, "bpe")
