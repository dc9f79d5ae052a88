"""`--bf16` and `--memory-efficient-bf16` on any device: on the command line, fairseq takes them to imply a TPU.

fairseq-hydra-train has separate settings `common.bf16` and `common.tpu` and is not affected. Ranks that fairseq spawns
inherit the settings parsed here.
"""

import functools
import sys
from importlib.util import find_spec
from typing import Any, Callable

from fairseq import options


def without_implied_tpu(parse: Callable) -> Callable:
    """fairseq's options.parse_args_and_arch, except that without torch_xla `tpu` is set only by --tpu."""

    @functools.wraps(parse)
    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any):
        parsed = parse(parser, input_args, *args, **kwargs)
        given = "--tpu" in (sys.argv[1:] if input_args is None else input_args)
        namespace = parsed[0] if isinstance(parsed, tuple) else parsed  # with parse_known, (namespace, other arguments)
        if getattr(namespace, "bf16", False) and not given and find_spec("torch_xla") is None:
            namespace.tpu = False
        return parsed

    return parse_args_and_arch


def install() -> None:
    """Replace fairseq's function: fairseq imports a user-dir while building its parser, and looks the function up later."""
    if not hasattr(options.parse_args_and_arch, "__wrapped__"):
        options.parse_args_and_arch = without_implied_tpu(options.parse_args_and_arch)
