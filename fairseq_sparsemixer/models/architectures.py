"""Defaults of the experts' flags for fairseq's architecture functions."""

from dataclasses import fields
from typing import Any


def fill_defaults(args: Any, options: type) -> None:
    """Give args every field of the dataclass `options` that it does not have yet."""
    fill(args, **{option.name: option.default for option in fields(options)})


def fill(args: Any, **defaults: Any) -> None:
    """Give args every one of the defaults that it does not have yet."""
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)
