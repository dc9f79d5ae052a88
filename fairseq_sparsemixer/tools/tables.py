"""Markdown tables."""

from typing import Any, Sequence

from tabulate import tabulate

NOTHING = "–"  # for a missing figure


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table, with columns aligned in the source text; cells are kept as given."""
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def cell(form: str, value: Any) -> str:
    """A figure formatted by `form`, such as "{:.3f}"; a dash for None."""
    return NOTHING if value is None else form.format(value)
