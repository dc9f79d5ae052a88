"""95% intervals of a mean over seeds: Student's t, without scipy, which training does not need."""

import math
from typing import Dict, Optional, Sequence

from fairseq_sparsemixer.tools.study.groups import deviation

LEVEL = 0.95
BISECTIONS = 60  # enough for float64


def mean_interval(values: Sequence[float]) -> Dict[str, Optional[float]]:
    """{"mean", "low", "high"} of at least one value; low and high are None for one, and NaN if a value is not finite."""
    mean, spread = sum(values) / len(values), deviation(values)
    if spread is None:
        return {"mean": mean, "low": None, "high": None}
    half = t_quantile(len(values) - 1) * spread / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t for which |T| <= t has the probability `level`; T is Student's with `freedom` degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < level else (low, middle)
    return math.tan((low + high) / 2) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= tan(angle) * sqrt(freedom)), a finite sum (Abramowitz and Stegun, 26.7.3 for odd, 26.7.4 for even degrees)."""
    odd = freedom % 2
    term, total = math.cos(angle) ** odd, 0.0
    for n in range(1 + odd, freedom, 2):
        total += term
        term *= n / (n + 1) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total
