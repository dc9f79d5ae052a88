"""Processes that a test forks itself: they share its modules, patches and functions."""

import os
from typing import Callable


def in_child(action: Callable[[], None]) -> int:
    """The pid of a forked process that does `action`; it exits with 0, even after an error, unless `action` exits first."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid
