"""Tables in Markdown."""

from typing import Any, Sequence

from tabulate import tabulate

NOTHING = "–"  # in the place of a figure that there is not


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table, its columns aligned for readers of the text; cells stay as they are written."""
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def cell(form: str, value: Any) -> str:
    """A figure in its form, such as "{:.3f}"; a dash for None."""
    return NOTHING if value is None else form.format(value)
