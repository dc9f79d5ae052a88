"""Safe loading of numpy arrays and scalars from a checkpoint, where validation metrics such as BLEU store them.

A pickle creates them by calling numpy with arguments chosen by the file; with some arguments, numpy would read memory at
an address from the file. So torch's weights_only loader gets stand-ins under numpy's names, which create only arrays of
plain numbers.
"""

import re
from typing import Any, List, Tuple

import numpy

PLAIN = re.compile(r"[<>|=]?(?:[biu]1|[iuf][248]|c8|c16|\?)")  # booleans, integers, floating and complex numbers
NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")  # of numpy 2 and 1


class NoNumbers(ValueError):
    """An array in a file does not hold numbers, or is not in numpy's format."""


class PlainType:
    """Stand-in for numpy.dtype in pickles. `kind`: the actual dtype."""

    def __init__(self, code: Any = None, *_: Any):
        if not isinstance(code, str) or not PLAIN.fullmatch(code):
            raise NoNumbers(f"arrays of type {code} are not numbers")
        self.kind = numpy.dtype(code)

    def __setstate__(self, state: Any) -> None:
        order, rest = state[1], [entry for entry in state[2:5] if entry is not None]
        if order not in ("<", ">", "|", "=") or rest or tuple(state[5:8]) != (-1, -1, 0):
            raise NoNumbers("the type of an array is not that of plain numbers")
        self.kind = self.kind.newbyteorder(order)

    def __reduce__(self) -> Any:
        return self.kind.__reduce__()


class PlainArray(numpy.ndarray):
    """Stand-in for numpy.ndarray in pickles. Behaves like an ordinary array and is saved as one."""

    def __new__(cls, *_: Any) -> "PlainArray":
        return numpy.empty(0).view(cls)

    def __setstate__(self, state: Any) -> None:
        _, shape, plain, by_column, content = state
        if not isinstance(plain, PlainType) or not isinstance(content, bytes):
            raise NoNumbers("the content of an array is not plain numbers")
        whole = (1, tuple(shape), plain.kind, bool(by_column), content)
        super().__setstate__(whole)  # type: ignore[arg-type]  # numpy's annotation wants numpy's own bool

    def __reduce__(self) -> Any:
        return numpy.array(self, subok=False).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return numpy.array(self, subok=False).__reduce_ex__(protocol)


def array(*_: Any) -> PlainArray:
    """Stand-in for numpy's _reconstruct: an empty array, filled afterwards."""
    return PlainArray()


def number(plain: Any, content: Any) -> Any:
    """Stand-in for numpy's scalar: one number from its bytes."""
    if not isinstance(plain, PlainType) or not isinstance(content, bytes) or len(content) != plain.kind.itemsize:
        raise NoNumbers("a numpy scalar is not a plain number")
    return numpy.frombuffer(content, plain.kind)[0]


def no_bytes(*content: Any) -> bytes:
    """Stand-in for bytes, which a pickle calls for the content of an empty array."""
    if content:
        raise NoNumbers("bytes made of something else")
    return b""


def encoded(text: Any, encoding: Any = None) -> bytes:
    """Stand-in for the encoder that protocol 2 pickles call for bytes, which torch 2.4 does not allow by default."""
    if not isinstance(text, str) or encoding != "latin1":
        raise NoNumbers("bytes that are not in pickle's format")
    return text.encode("latin1")


def safe_globals() -> List[Any]:
    """The arguments for torch.serialization.add_safe_globals."""
    named: List[Tuple[Any, str, str]] = [(PlainType, "numpy", "dtype"), (PlainArray, "numpy", "ndarray")]
    for module in NUMPY_MODULES:
        named += [(_copy(array), module, "_reconstruct"), (_copy(number), module, "scalar")]
    named += [(_copy(no_bytes), module, "bytes") for module in ("builtins", "__builtin__")]
    named.append((_copy(encoded), "_codecs", "encode"))
    for stand_in, module, name in named:
        stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, name, name  # torch looks it up by these
    return [stand_in for stand_in, _, _ in named]


def _copy(function: Any) -> Any:
    """A copy of the function, so that it can have another name."""
    return lambda *arguments: function(*arguments)
