"""Reading Multi30k's raw files."""

import gzip

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.multi30k_en_de.raw_text import FILES, read_multi30k


@pytest.fixture
def raw(tmp_path):
    """A folder with two pairs per split."""
    for name in FILES.values():
        (tmp_path / f"{name}.en.gz").write_bytes(gzip.compress(b"a dog\nA cat .\n"))
        (tmp_path / f"{name}.de.gz").write_bytes(gzip.compress("ein Hund\nEine Kätzin .\n".encode()))
    return tmp_path


def test_pairs_are_read_in_order_gzipped_or_not(raw):
    (raw / "val.en.gz").unlink()
    (raw / "val.en").write_text("a dog\nA bird\u2028here .\n", encoding="utf-8")
    corpus = read_multi30k(raw)
    assert corpus["train"] == [("a dog", "ein Hund"), ("A cat .", "Eine Kätzin .")]
    assert corpus["valid"][1] == ("A bird here .", "Eine Kätzin .")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"ein Hund\n", "train.de.gz ends before line 2"),
        (b"ein Hund\n\n", "train.de.gz, line 2 is empty"),
        (b"ein Hund\nEine K\xe4tzin\n", "train.de.gz, line 2 is not UTF-8"),
    ],
)
def test_text_that_is_not_parallel_is_refused_with_file_and_line(raw, content, message):
    (raw / "train.de.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ConfigurationError, match=message):
        read_multi30k(raw)


def test_a_missing_split_and_a_truncated_file_are_named(raw):
    whole = (raw / "train.en.gz").read_bytes()
    (raw / "train.en.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigurationError, match="train.en.gz cannot be read beyond line"):
        read_multi30k(raw)
    (raw / "train.en.gz").unlink()
    with pytest.raises(ConfigurationError, match="has no train.en, gzipped or not"):
        read_multi30k(raw)


def test_the_real_files_are_read(shared_data):
    corpus = read_multi30k(shared_data / "multi30k")
    assert [len(corpus[split]) for split in ("train", "valid", "test")] == [29_000, 1_014, 1_000]
