"""Processes forked by a test, which share its modules, patches and functions."""

import os
from typing import Callable


def in_child(action: Callable[[], None]) -> int:
    """Fork a process that runs `action`. Returns its pid. It exits with 0, even after an error, unless `action` exits first."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    return pid
