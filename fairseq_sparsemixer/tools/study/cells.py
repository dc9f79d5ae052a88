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
    return number(figure["mean"], digits) + ("" if figure["low"] is None else f" {bounds(figure, digits)}")


def bounds(figure: Figure, digits: int) -> str:
    """`[1.20, 1.26]`, of {"low", "high"}."""
    if figure is None or figure["low"] is None:
        return NOTHING
    return f"[{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"
