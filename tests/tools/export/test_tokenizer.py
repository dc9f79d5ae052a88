"""The files of the tokenizer that an export is given."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.export.tokenizer import _vocabulary


@pytest.mark.parametrize("content", [b"\xff\xfe\x0a", b"a 1\na 1\n", b"a b\n"])
def test_what_is_not_a_dictionary_is_refused(tmp_path, content):
    """A sentencepiece model, say, in place of dict.txt; a word twice; a line without a count."""
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(ConfigurationError, match="dict.txt is not a dictionary .*; give the dict.txt of fairseq-preprocess"):
        _vocabulary(str(tmp_path / "dict.txt"), {}, 4)
    with pytest.raises(ConfigurationError, match="no is not a dictionary"):
        _vocabulary(str(tmp_path / "no"), {}, 4)
