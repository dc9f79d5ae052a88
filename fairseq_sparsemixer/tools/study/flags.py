"""Checks a study's flags before anything is trained, against the parsers of fairseq's programs and the routers themselves.

Names: argparse would accept `see` for `seed`. Values: as far as they can be checked without a model, and none is evaluated.
"""

import argparse
import ast
import contextlib
import io
from dataclasses import asdict
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Dict, Optional, Tuple

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE, build_gate
from fairseq_sparsemixer.options import MoEOptions, in_flags
from fairseq_sparsemixer.tools.study.commands import USER_DIR, as_arguments

PARSERS = {
    "fairseq-train": "get_training_parser",
    "fairseq-generate": "get_generation_parser",
    "fairseq-eval-lm": "get_eval_lm_parser",
}
ARCH = "transformer_moe"  # its flags are known if no architecture is given
BUDGETS = ("max-update", "max-epoch", "stop-time-hours", "stop-min-lr", "patience")  # each ends a training if above 0
KINDS = {int: "a whole number", float: "a number"}

Actions = Dict[str, argparse.Action]  # by flag, such as `--lr`


def refused_flag(program: str, flags: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """The first flag that the program lacks by its whole name or whose value it refuses, and the rest of a sentence; or None.

    The program's flags are those with the architecture, task etc. of the flags. Raises ConfigurationError for an unknown
    architecture, task etc.
    """
    actions = _actions(program, flags)
    for name, value in flags.items():
        action = actions.get(f"--{name}")
        if action is None:
            close = get_close_matches(f"--{name}", [known for known in actions if len(known) > 2], n=1)
            remedy = f"the closest is {close[0][2:]}" if close else "give its whole name, or remove it"
            return name, f", and {program} has no such flag with this task, arch and criterion; {remedy}"
        complaint = _complaint(action, value)
        if complaint:
            return name, complaint
    return None


def has_budget(flags: Dict[str, Any]) -> bool:
    """Whether some flag ends the training; fairseq-train goes on for ever otherwise, also with --max-update 0."""
    return any(_number(flags.get(name)) > 0 for name in BUDGETS)


def check_router(flags: Dict[str, Any], num_experts: Optional[int]) -> None:
    """Raise ConfigurationError, naming the flag, for options that the router, or this number of experts, refuses."""
    from fairseq_sparsemixer.plugin.models.config import check_kinds, check_numbers
    from fairseq_sparsemixer.plugin.models.router_options import router_options

    actions = _actions("fairseq-train", flags)
    options = argparse.Namespace(**asdict(MoEOptions()))
    for name, value in flags.items():
        field = name.replace("-", "_")
        if value is not None and hasattr(options, field):
            kind = actions[f"--{name}"].type
            setattr(options, field, kind(str(value)) if kind in KINDS else value)
    if options.router == DENSE or num_experts is None:
        return
    options.num_experts = num_experts
    check_kinds(options)
    check_numbers(options)
    with in_flags():
        build_gate(options.router, 1, num_experts, **router_options(options))


def _complaint(action: argparse.Action, value: Any) -> Optional[str]:
    """The end of a sentence on why a flag cannot have this value; None if it can, as far as is known without evaluating it."""
    if value is None:
        return None
    if action.nargs == 0:
        return None if isinstance(value, bool) else ", which takes no value; give true or false"
    if isinstance(value, bool):
        alone = value and action.nargs == "?"
        return None if alone else ", which takes a value; give one, with quotes if it is a word such as no, off or yes"
    parts = value if isinstance(value, list) else [value]
    if len(parts) != 1 and action.nargs in (None, "?"):
        return f", which takes a single value; write several as text, such as '{','.join(map(str, parts))}'"
    return next(filter(None, (_part_complaint(action, str(part)) for part in parts)), None)


def _part_complaint(action: argparse.Action, text: str) -> Optional[str]:
    kind: Any = action.type
    if kind in KINDS:
        try:
            kind(text)
        except ValueError:
            return f"; give {KINDS[kind]}"
    if kind is not None and getattr(kind, "__name__", "") == "<lambda>" and not _is_numeric(text):
        return "; give a number, or several with commas between them"
    if action.choices is not None and text not in map(str, action.choices):
        return f"; choose from {', '.join(sorted(map(str, action.choices)))}"
    return None


def _is_numeric(text: str) -> bool:
    """Whether an expression that fairseq will evaluate, such as `0.1,0.2`, has no names in it."""
    try:
        return not any(isinstance(node, (ast.Name, ast.Call)) for node in ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def _actions(program: str, flags: Dict[str, Any]) -> Actions:
    from fairseq import registry  # takes seconds

    # only values that add flags of their own: fairseq evaluates some of the others as expressions
    names = ["task", *(name.replace("_", "-") for name in registry.REGISTRIES)]
    chosen = {name: flags[name] for name in names if name in flags}
    if program == "fairseq-train":
        chosen["arch"] = flags.get("arch") or ARCH
    return _parsed_actions(program, tuple(as_arguments(chosen)))


@lru_cache(maxsize=None)
def _parsed_actions(program: str, arguments: Tuple[str, ...]) -> Actions:
    from fairseq import options

    parser = getattr(options, PARSERS[program])()
    parser.error = _refuse
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options.parse_args_and_arch(parser, ["data", "--user-dir", USER_DIR, *arguments], parse_known=True)
    return dict(parser._option_string_actions)


def _refuse(message: str) -> None:
    raise ConfigurationError(message.split(" (choose from")[0][:200])  # there are hundreds of architectures
