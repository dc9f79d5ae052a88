"""The root logger, which belongs to the program and not to the libraries it imports."""

import logging
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def root_logger_untouched() -> Iterator[None]:
    """Undo what imports do to the root logger: fairseq's wav2vec2_classification turns on the DEBUG lines of every library.

    fairseq's own commands set it up before they import anything, and their setting stays.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
