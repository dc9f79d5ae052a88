"""What the numbers of flags may be. NaN fails every comparison, and so every check that is written as one that must hold."""

import math
from typing import Any, Callable, NamedTuple


class Rule(NamedTuple):
    """`holds` for the numbers that are allowed; `must` completes the sentence "--flag value must ...".

    whole: whether it has to be an integer.
    """

    holds: Callable[[Any], bool]
    must: str
    whole: bool = False


NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "be at least 0 and finite")
POSITIVE = Rule(lambda x: 0 < x < math.inf, "be above 0 and finite")
PROBABILITY = Rule(lambda x: 0 <= x < 1, "be at least 0 and less than 1")
COUNT = Rule(lambda x: x >= 1, "be at least 1", whole=True)


def broken_rule(flag: str, value: Any, rule: Rule, remedy: str = "") -> str:
    """The sentence for a value that breaks the rule; empty for one that does not. A text or a truth value is no number."""
    kinds = int if rule.whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and rule.holds(value):
        return ""
    must = f"be a whole number, and {rule.must}" if rule.whole and not isinstance(value, int) else rule.must
    return f"{flag} {value} must {must}" + (f"; {remedy}" if remedy else "")
