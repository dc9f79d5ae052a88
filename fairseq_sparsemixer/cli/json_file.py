"""The `--json FILE` of the commands."""

import json
import os
from pathlib import Path
from typing import Any, Dict

from fairseq_sparsemixer.errors import ConfigurationError


def write_json(path: str, content: Dict[str, Any]) -> None:
    """Write the whole file or nothing. Raises ConfigurationError where it cannot be written."""
    target = Path(path)
    partial = target.with_name(target.name + ".part")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written ({error.strerror}); give another path") from None
