"""`fairseq-sparsemixer <command>`: each command is a module here with a HELP line, `add_arguments` and `run`."""

import argparse
from importlib import import_module
from typing import List, Optional

import fairseq_sparsemixer
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.requirements import without

COMMANDS = {  # by name, the module
    "user-dir": "user_dir",
    "doctor": "doctor",
    "fidelity": "fidelity",
    "glue": "glue",
    "inspect": "inspect",
    "launch": "launch",
    "plot": "plot",
    "study": "study",
    "reshard": "reshard",
    "upcycle": "upcycle",
    "convert": "convert",
    "completion": "completion",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="fairseq-sparsemixer", description="Tools around Mixture-of-Experts training in fairseq."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {fairseq_sparsemixer.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module_name in COMMANDS.items():
        module = import_module(f"{__name__}.{module_name}")
        command = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command; the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        sentence = without(error, options.command)
        if sentence is None:
            raise
        raise ConfigurationError(sentence) from None
