"""Parsing fairseq-generate's hypotheses and lines of text."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.generation import read_hypothesis, read_sentences
from fairseq_sparsemixer.tools.sentences import read_pairs
from fairseq_sparsemixer.tools.study.scores import read_hypotheses

BREAKS = "one\u2028two\x85three\x0cfour"  # str.splitlines treats these as line ends


def test_only_hypothesis_lines_give_number_and_text():
    assert read_hypothesis("D-12\t-0.5\tein Hund\n") == (12, "ein Hund")
    assert read_hypothesis("D-3\t-inf\t\n") == (3, "")
    assert [read_hypothesis(line) for line in ("H-12\t-0.5\tein Hund", "S-1\tD-1", "2026 | INFO | D-1\t0\tx")] == [None] * 3


def test_only_line_feeds_end_a_sentence(tmp_path):
    (tmp_path / "text").write_text(f"{BREAKS}\n\nlast\n\n", encoding="utf-8")
    assert read_sentences(tmp_path / "text") == [BREAKS, "", "last", ""]
    (tmp_path / "text").write_text("no end", encoding="utf-8")
    assert read_sentences(tmp_path / "text") == ["no end"]


def test_hypotheses_are_in_the_order_of_the_test_set(tmp_path):
    output = tmp_path / "test.txt"
    output.write_text(f"S-10\tx\nD-10\t-1\tlast\nD-9\t-1\t{BREAKS}\nD-0\t-1\t\n", encoding="utf-8")
    assert read_hypotheses(output) == ["", BREAKS, "last"]


def test_an_unreadable_file_is_named_with_the_line(tmp_path):
    (tmp_path / "latin").write_bytes(b"gut\nK\xe4tzin\n")
    with pytest.raises(ConfigurationError, match="latin, line 2 is not UTF-8; convert the file"):
        read_sentences(tmp_path / "latin")
    with pytest.raises(ConfigurationError, match="none cannot be read"):
        read_sentences(tmp_path / "none")
    with pytest.raises(ConfigurationError, match="--text .*latin, line 2 is not UTF-8"):
        read_pairs(str(tmp_path / "latin"), str(tmp_path / "latin"))
