"""Allowed ranges of numeric flags. NaN fails every comparison, so checks are written as conditions that must hold."""

import math
from typing import Any, Callable, NamedTuple

YEAR = 31_536_000  # seconds; larger values overflow the clocks of torch's backends
TOO_LARGE = 2**31  # counts must stay below this limit of tensors


class Rule(NamedTuple):
    """`holds` is true for allowed numbers; `must` completes the sentence "--flag value must ...".

    whole: whether the number must be an integer.
    """

    holds: Callable[[Any], bool]
    must: str
    whole: bool = False


NOT_NEGATIVE = Rule(lambda x: 0 <= x < math.inf, "be at least 0 and finite")
POSITIVE = Rule(lambda x: 0 < x < math.inf, "be above 0 and finite")
PROBABILITY = Rule(lambda x: 0 <= x < 1, "be at least 0 and less than 1")
SECONDS = Rule(lambda x: 0.001 <= x <= YEAR, f"be a number of seconds between 0.001 and {YEAR}")
COUNT = Rule(lambda x: 1 <= x < TOO_LARGE, "be at least 1", whole=True)


def broken_rule(flag: str, value: Any, rule: Rule, remedy: str = "") -> str:
    """The error sentence if the value breaks the rule, else an empty string. Strings and booleans are not numbers."""
    kinds = int if rule.whole else (int, float)
    if isinstance(value, kinds) and not isinstance(value, bool) and rule.holds(value):
        return ""
    if isinstance(value, str):  # argparse has converted what the command line gives
        return f"{flag} '{value}' must be a number; in a YAML file, write it without quotes"
    if isinstance(value, int) and value >= TOO_LARGE and rule.holds(TOO_LARGE - 1) and not rule.holds(TOO_LARGE):
        return f"{flag} {value} is too large; give less than {TOO_LARGE}"
    must = f"be a whole number, and {rule.must}" if rule.whole and not isinstance(value, int) else rule.must
    return f"{flag} {value} must {must}" + (f"; {remedy}" if remedy else "")
