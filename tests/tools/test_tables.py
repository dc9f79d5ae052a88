"""Markdown tables."""

from fairseq_sparsemixer.tools.tables import cell, markdown_table


def test_a_table_is_aligned_markdown():
    lines = markdown_table(["a", "b"], [[1, 2], ["x", "1.50"]]).splitlines()
    assert [[part.strip() for part in line.split("|")] for line in (lines[0], *lines[2:])] == [
        ["", "a", "b", ""], ["", "1", "2", ""], ["", "x", "1.50", ""],
    ]  # fmt: skip
    assert set(lines[1]) == {"|", "-"} and len({len(line) for line in lines}) == 1


def test_a_missing_figure_is_a_dash():
    assert [cell("{:.2f}", value) for value in (1, None, 0.5)] == ["1.00", "–", "0.50"]


def test_a_bar_in_a_cell_is_escaped_once():
    assert markdown_table(["a|b"], [["c\\|d"]]).splitlines()[::2] == ["| a\\|b   |", "| c\\|d   |"]
