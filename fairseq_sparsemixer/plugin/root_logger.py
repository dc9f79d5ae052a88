"""Protects the root logger, which belongs to the program and not to the libraries it imports."""

import logging
from contextlib import contextmanager
from typing import Iterator


@contextmanager
def root_logger_untouched() -> Iterator[None]:
    """Undo changes of imports to the root logger: fairseq's wav2vec2_classification enables DEBUG logging of every library.

    fairseq's own commands configure it before importing anything, and their configuration is kept.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
