"""Strings evaluated as literals: the same result as eval for literals, an error without evaluation for others."""

import pytest

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.literals import literal

LITERALS = [
    "[(512, 3)] * 20", "[(512, 3)] * 4 + [(1024, 1)]", "[(512, 10, 8)] + [(512,3,2)] * 4 + [(512, 2, 2)] * 2", "(0.9, 0.98)",
    "True", "False", "None", "4096,10240", "-1", "1e-30,1e-3", " [0.5] ", "1 / 4 + 2 ** -2", "7 // 2", "+3 - -2", "'a' 'b' + 'c'",
    "{'a': [1]}",    "{1, 2}", "[]", "()", "not 1", "2 * [1]", "0 * 'abc'", "1_000", "'open()'", "[1,\n 2]",
]  # fmt: skip
CODE = [
    "open('x', 'w') and [(8, 3)] * 2", "__import__('os').system('true')", "x", "[x for x in (1, 2)]", "(lambda: 1)()", "(1).real",
    "[1][0]", "f'{1}'", "1 if 1 else 2", "1 < 2", "1 and 2", "'%s' % 1", "{**{}}", "[*(1, 2)]", "print", "(y := 1)", "b'a'", "1j",
    "...",    "import os", "1; 2", "", "(", "1 / 0", "'a' + 1", "{[]: 1}", "~1", "1 << 2", "5 % 3", "\x00",
]  # fmt: skip
ENDLESS = [
    "9**9**9", "9**9**9**9", "[0] * 10**9", "'a' * 10**10", "10**9 * [[0] * 100]", "[[[[0] * 99] * 99] * 99] * 99", "2.0**4000",
    "(" * 5000, "-" * 4000 + "1", "[" * 150 + "]" * 150, "1" + "+1" * 3000, "1+" * 3_000_000 + "1", "(2**64)**64**64", "9" * 4999,
    "(9**64)**64", "*".join(["99999999999999999999"] * 240),
]  # fmt: skip


@pytest.mark.parametrize("text", LITERALS)
def test_literals_evaluate_as_in_python(text):
    found = literal(text, {}, {})
    assert found == eval(text.strip()) and type(found) is type(eval(text.strip()))


@pytest.mark.parametrize("text", CODE)
def test_anything_else_is_refused(text):
    with pytest.raises(ConfigurationError, match="is not evaluated: it is more than numbers"):
        literal(text)


@pytest.mark.parametrize("text", ENDLESS)
def test_expensive_expressions_are_refused_or_small(text):  # eval would not return
    try:
        assert len(repr(literal(text))) < 100_000
    except ConfigurationError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)


@pytest.mark.parametrize("value", [None, True, 3, [1], b"1"])
def test_a_value_that_is_not_a_string_is_a_type_error_as_with_eval(value):
    with pytest.raises(TypeError):
        literal(value)
