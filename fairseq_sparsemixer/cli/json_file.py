"""The commands' `--json FILE`."""

import json
import math
import os
from pathlib import Path
from typing import Any, Iterable, Optional, Union

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import is_special, overwritten, unfinished_beside, write_whole


def require_json(path: Optional[str], others: Iterable[str] = (), flag: str = "--json") -> None:
    """Raise ConfigurationError, before any work is done, if the file cannot be written or is another file of the command."""
    if path is None:
        return
    if not path:
        raise ConfigurationError(f"{flag} '' is empty; give a path")
    others = list(others)
    if overwritten(others, [path]) or os.path.realpath(path) in map(os.path.realpath, others):
        raise ConfigurationError(f"{flag} {path} would overwrite a file of this command; give another path")
    if is_special(path):
        return
    try:
        if os.path.isdir(path):
            raise IsADirectoryError
        with unfinished_beside(os.path.realpath(path)):
            pass
    except (OSError, ValueError):
        raise ConfigurationError(f"{flag} {path} cannot be written; give a file in an existing, writable folder") from None


def as_json(content: Any) -> str:
    """The content as JSON, with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Union[str, Path], content: Any) -> None:
    """Write the file atomically. Raises ConfigurationError if it cannot be written."""
    try:
        write_whole(Path(path), as_json(content))
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written ({error.strerror}); give another path") from None
