"""Runs a malformed input in this process, and reports faults in how it ends."""

import contextlib
import hashlib
import io
import os
import signal
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from malformed import Case

PATIENCE = 120  # seconds; only a hung case takes longer
LONGEST = 1500  # characters of an error message


class Hung(BaseException):
    """The case did not end in time."""


def files_below(folder: Path) -> Dict[str, str]:
    """A digest of every regular file below the folder."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    found[path] = hashlib.sha1(file.read()).hexdigest()
    return found


def fault_of(case: Case, folder: Path, run: Callable[[List[str]], Optional[int]]) -> Tuple[str, str]:
    """("refused", "passed" or "fault"; the message or the fault) of a case. Files in `folder` must stay unchanged."""
    before = files_below(folder)
    said = io.StringIO()
    status, message = 0, ""

    def hang(*_):
        raise Hung

    signal.signal(signal.SIGALRM, hang)
    signal.alarm(PATIENCE)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = run(case.arguments) or 0
    except SystemExit as error:
        status = error.code or 0
        message = status if isinstance(status, str) else ""
    except Hung:
        return "fault", "does not end"
    except BaseException as error:
        return "fault", f"raises {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    message = message or (said.getvalue().strip().splitlines() or [""])[-1]
    after = files_below(folder)
    lost = [path for path in before if after.get(path) != before[path]]
    if lost:
        return "fault", f"changes {lost[0]}"
    new = [path for path in after if path not in before]
    if not status:
        for path in new:  # restore the folder for the next case
            os.remove(path)
        return ("passed", message) if case.may_pass else ("fault", "succeeds")
    if new:
        return "fault", f"leaves {new[0]}"
    if "\n" in message or len(message) > LONGEST or not message:
        return "fault", f"ends with {message[:300]!r}"
    if not any(word in message for word in case.mentions):
        return "fault", f"names neither of {case.mentions}: {message[:300]}"
    return "refused", message
