"""Markdown tables."""

import re
from typing import Any, Sequence

from tabulate import tabulate

BAR = re.compile(r"(?<!\\)\|")  # not escaped yet
NOTHING = "–"  # for a missing figure


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The table, with columns aligned in the source text; cells are kept as given, with a bar in one, as in `a|b`, escaped."""
    header, *rows = ([BAR.sub(r"\|", str(text)) for text in row] for row in (header, *rows))
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True)


def cell(form: str, value: Any) -> str:
    """A figure formatted by `form`, such as "{:.3f}"; a dash for None."""
    return NOTHING if value is None else form.format(value)
