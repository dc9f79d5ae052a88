"""Refuses flags that would change nothing beside, or without, other flags."""

import argparse

from fairseq_sparsemixer.errors import ConfigurationError


def refuse_unused(options: argparse.Namespace, names: str, why: str) -> None:
    """Raise ConfigurationError if one of the options `names`, separated by spaces, was given: `--seed 3 {why}; leave it out`.

    Options that were not given are None, or False.
    """
    for name in names.split():
        value = getattr(options, name)
        if value is not None and value is not False:
            given = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
            raise ConfigurationError(f"--{name.replace('_', '-')}{given} {why}; leave it out")
