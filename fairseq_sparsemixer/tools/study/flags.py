"""Checks the names of a study's flags against the parsers of fairseq's programs: argparse would accept `see` for `seed`."""

import contextlib
import io
from typing import Any, Dict, Optional, Set

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.commands import USER_DIR, as_arguments

PARSERS = {
    "fairseq-train": "get_training_parser",
    "fairseq-generate": "get_generation_parser",
    "fairseq-eval-lm": "get_eval_lm_parser",
}
ARCH = "transformer_moe"  # its flags are known if no architecture is given


def unknown_flag(program: str, flags: Dict[str, Any]) -> Optional[str]:
    """The first flag that the program lacks, by its whole name, with the architecture, task etc. of the flags; else None.

    Raises ConfigurationError for an unknown architecture, task etc.
    """
    known = _known_flags(program, flags)
    return next((name for name in flags if f"--{name}" not in known), None)


def _known_flags(program: str, flags: Dict[str, Any]) -> Set[str]:
    from fairseq import options, registry  # takes seconds

    parser = getattr(options, PARSERS[program])()
    parser.error = _refuse
    # only values that add flags of their own: fairseq evaluates some of the others as expressions
    names = ["task", *(name.replace("_", "-") for name in registry.REGISTRIES)]
    chosen = {name: flags[name] for name in names if name in flags}
    if program == "fairseq-train":
        chosen["arch"] = flags.get("arch") or ARCH
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options.parse_args_and_arch(parser, ["data", "--user-dir", USER_DIR, *as_arguments(chosen)], parse_known=True)
    return set(parser._option_string_actions)


def _refuse(message: str) -> None:
    raise ConfigurationError(message.split(" (choose from")[0][:200])  # there are hundreds of architectures
