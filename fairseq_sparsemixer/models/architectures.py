"""Defaults of the experts' flags for fairseq's architecture functions."""

from dataclasses import fields
from typing import Any


def fill_defaults(args: Any, options: type) -> None:
    """Give args every field of the dataclass `options` that it does not have yet."""
    for option in fields(options):
        if not hasattr(args, option.name):
            setattr(args, option.name, option.default)
