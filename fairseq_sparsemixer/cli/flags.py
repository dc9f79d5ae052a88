"""Adds a dataclass's fields as flags, as fairseq does for a model's, but without importing fairseq."""

import argparse
from dataclasses import fields
from typing import Any, Optional

KINDS = {int: int, Optional[int]: int, float: float, Optional[float]: float, str: str, Optional[str]: str}


def add_flags(parser: argparse.ArgumentParser, options: Any) -> None:
    """Add one flag per field of a dataclass: --field-name, with the field's default and help text."""
    for field in fields(options):
        flag, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        if field.type is bool:
            parser.add_argument(flag, action="store_true", default=field.default, help=text)
        else:
            parser.add_argument(flag, type=KINDS[field.type], default=field.default, help=text)
