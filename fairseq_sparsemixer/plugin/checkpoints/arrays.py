"""Arrays and numbers of numpy out of a checkpoint: what validation metrics such as BLEU keep beside tensors.

A pickle makes them by calling numpy, with arguments that the file chooses: with some, numpy would read memory that the file
names. So torch's weights_only loader is given stand-ins under numpy's names, which make arrays of plain numbers and nothing
else.
"""

import re
from typing import Any, List, Tuple

import numpy

PLAIN = re.compile(r"[<>|=]?(?:[biu]1|[iuf][248]|c8|c16|\?)")  # booleans, integers, floating and complex numbers
NUMPY_MODULES = ("numpy._core.multiarray", "numpy.core.multiarray")  # of numpy 2 and 1


class NoNumbers(ValueError):
    """An array in a file is of something else than numbers, or not as numpy writes one."""


class PlainType:
    """Stands for numpy.dtype, as pickles use it. `kind`: the dtype it means."""

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
    """Stands for numpy.ndarray in pickles. An array like any other, and saved as one."""

    def __new__(cls, *_: Any) -> "PlainArray":
        return numpy.empty(0).view(cls)

    def __setstate__(self, state: Any) -> None:
        _, shape, plain, by_column, content = state
        if not isinstance(plain, PlainType) or not isinstance(content, bytes):
            raise NoNumbers("the content of an array is not plain numbers")
        whole = (1, tuple(shape), plain.kind, bool(by_column), content)
        super().__setstate__(whole)  # type: ignore[arg-type]  # numpy's annotation asks for a bool of its own

    def __reduce__(self) -> Any:
        return numpy.array(self, subok=False).__reduce__()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return numpy.array(self, subok=False).__reduce_ex__(protocol)


def array(*_: Any) -> PlainArray:
    """Stands for numpy's _reconstruct: an empty array, which is filled afterwards."""
    return PlainArray()


def number(plain: Any, content: Any) -> Any:
    """Stands for numpy's scalar: one number out of its bytes."""
    if not isinstance(plain, PlainType) or not isinstance(content, bytes) or len(content) != plain.kind.itemsize:
        raise NoNumbers("a number of numpy is not a plain one")
    return numpy.frombuffer(content, plain.kind)[0]


def no_bytes(*content: Any) -> bytes:
    """Stands for bytes, which a pickle calls for the content of an array without items."""
    if content:
        raise NoNumbers("bytes made of something else")
    return b""


def encoded(text: Any, encoding: Any = None) -> bytes:
    """Stands for the encoder that a pickle of protocol 2 calls for bytes, which torch 2.4 does not allow by itself."""
    if not isinstance(text, str) or encoding != "latin1":
        raise NoNumbers("bytes that are not written as pickles write them")
    return text.encode("latin1")


def safe_globals() -> List[Any]:
    """What to hand to torch.serialization.add_safe_globals."""
    named: List[Tuple[Any, str, str]] = [(PlainType, "numpy", "dtype"), (PlainArray, "numpy", "ndarray")]
    for module in NUMPY_MODULES:
        named += [(_copy(array), module, "_reconstruct"), (_copy(number), module, "scalar")]
    named += [(_copy(no_bytes), module, "bytes") for module in ("builtins", "__builtin__")]
    named.append((_copy(encoded), "_codecs", "encode"))
    for stand_in, module, name in named:
        stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module, name, name  # by which torch finds it
    return [stand_in for stand_in, _, _ in named]


def _copy(function: Any) -> Any:
    """A function of its own, to go by another name."""
    return lambda *arguments: function(*arguments)
