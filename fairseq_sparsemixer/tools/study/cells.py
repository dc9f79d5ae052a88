"""Figures as they stand in the cells of a report's tables."""

from typing import Dict, Optional

from fairseq_sparsemixer.tools.tables import NOTHING, cell

Figure = Optional[Dict[str, Optional[float]]]


def number(value: Optional[float], digits: int) -> str:
    """`1.23`."""
    return cell(f"{{:.{digits}f}}", value)


def spread(figure: Figure, digits: int) -> str:
    """`1.23 ± 0.04`, of {"mean", "deviation"}."""
    if figure is None:
        return NOTHING
    deviation = figure["deviation"]
    return number(figure["mean"], digits) + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def interval(figure: Figure, digits: int) -> str:
    """`1.23 [1.20, 1.26]`, of {"mean", "low", "high"}."""
    if figure is None:
        return NOTHING
    low, high = figure["low"], figure["high"]
    return number(figure["mean"], digits) + ("" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]")
