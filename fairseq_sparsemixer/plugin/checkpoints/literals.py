"""Evaluates strings such as `[(512, 3)] * 4 + [(1024, 1)]`: literals and arithmetic only, nothing that could run code."""

import ast
import operator
from typing import Any, Callable, Dict, Type

from fairseq_sparsemixer.errors import ConfigurationError

LONGEST = 5_000  # characters of an expression, items of a value; fairseq's own have at most a few hundred
DEEPEST = 40  # nested operations and containers
LARGEST = 2**64  # bounds computed integers
HIGHEST_POWER = 64

BINARY: Dict[Type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
UNARY: Dict[Type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
CONTAINERS = {ast.Tuple: tuple, ast.List: list, ast.Set: set}


def literal(expression: str, *_: Any) -> Any:
    """Python's eval for numbers, strings, None, tuples, lists, sets, dicts and + - * / // ** of them.

    A drop-in replacement for eval; further arguments are ignored. Raises ConfigurationError for any other expression, and
    for values that need too much time or memory; TypeError, like eval, if the expression is not a string.
    """
    if not isinstance(expression, str):
        raise TypeError(f"{expression!r} is not a string to evaluate")
    try:
        if len(expression) > LONGEST:
            raise ValueError(f"longer than {LONGEST:,} characters")
        return _value(ast.parse(expression.strip(), mode="eval").body, DEEPEST)
    except (ValueError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error) or type(error).__name__
        raise ConfigurationError(
            f"{_short(expression)!r} is not evaluated: it is more than numbers, strings, lists and + - * / ** of them"
            f" ({_short(reason)}); write the value out"
        ) from None


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def _value(node: ast.AST, depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deeply")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, type(None))):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
        return CONTAINERS[type(node)](_value(item, depth - 1) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(key, depth - 1): _value(value, depth - 1) for key, value in zip(node.keys, node.values) if key}
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand, depth - 1))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
        _require_small(type(node.op), left, right)
        return BINARY[type(node.op)](left, right)
    raise ValueError(f"it has {_name(node)}")


def _name(node: ast.AST) -> str:
    return f"the name {node.id}" if isinstance(node, ast.Name) else f"a {type(node).__name__}"


def _require_small(operation: Type[ast.operator], left: Any, right: Any) -> None:
    """Raise ValueError before an operation whose result would be huge."""
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operation is ast.Pow and not (numbers and abs(right) <= HIGHEST_POWER and abs(left) < LARGEST):
        raise ValueError("a power too high")
    if numbers:
        if any(isinstance(side, int) and abs(side) > LARGEST**HIGHEST_POWER for side in (left, right)):
            raise ValueError("a number too large")
    elif operation is ast.Mult:
        sequence, count = (right, left) if isinstance(left, int) else (left, right)
        if not isinstance(count, int) or _items(sequence) * max(count, 1) > LONGEST:
            raise ValueError(f"more than {LONGEST:,} items")
    elif _items(left) + _items(right) > LONGEST:
        raise ValueError(f"more than {LONGEST:,} items")


def _items(value: Any) -> int:
    """The characters of a string; the items of a container, including nested ones."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 1 + sum(_items(key) + _items(item) for key, item in value.items())
    return 1 + sum(map(_items, value)) if isinstance(value, (list, tuple, set)) else 1
