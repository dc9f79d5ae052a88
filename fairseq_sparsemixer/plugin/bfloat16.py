"""`--bf16` and `--memory-efficient-bf16` on any device: on a command line, fairseq takes them to mean a TPU.

fairseq-hydra-train, whose YAML files name `common.bf16` and `common.tpu` each for itself, keeps the two apart. Ranks that
fairseq spawns are given the settings that were read here.
"""

import functools
import sys
from importlib.util import find_spec
from typing import Any, Callable

from fairseq import options


def without_implied_tpu(parse: Callable) -> Callable:
    """fairseq's options.parse_args_and_arch, whose `tpu` is as given where torch has no TPU."""

    @functools.wraps(parse)
    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any):
        parsed = parse(parser, input_args, *args, **kwargs)
        given = "--tpu" in (sys.argv[1:] if input_args is None else input_args)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed  # with parse_known, the other arguments come, too
        if getattr(namespace, "bf16", False) and not given and find_spec("torch_xla") is None:
            namespace.tpu = False
        return parsed

    return parse_args_and_arch


def install() -> None:
    """fairseq imports a user-dir while it makes its parser, and then calls this function by its module."""
    if not hasattr(options.parse_args_and_arch, "__wrapped__"):
        options.parse_args_and_arch = without_implied_tpu(options.parse_args_and_arch)
