"""The `--json FILE` of the commands."""

import json
from pathlib import Path
from typing import Any, Union

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole


def write_json(path: Union[str, Path], content: Any) -> None:
    """Write the whole file or nothing. Raises ConfigurationError where it cannot be written."""
    try:
        write_whole(Path(path), json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ConfigurationError(f"--json {path} cannot be written ({error.strerror}); give another path") from None
