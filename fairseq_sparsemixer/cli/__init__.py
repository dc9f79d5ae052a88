"""`fairseq-sparsemixer <command>`: each command is a module here with `add_arguments` and `run`."""

import argparse
import sys
from importlib import import_module
from typing import Dict, List, NamedTuple, Optional

import fairseq_sparsemixer
from fairseq_sparsemixer.errors import ConfigurationError


class Command(NamedTuple):
    """A command's module, and its line in --help."""

    module: str
    help: str


COMMANDS: Dict[str, Command] = {
    "user-dir": Command("user_dir", "print the path for fairseq's --user-dir"),
    "doctor": Command("doctor", "show what works on this machine, and what does not"),
    "fidelity": Command("fidelity", "compare every gradient estimator with the exact router gradient"),
    "glue": Command("glue", "prepare a GLUE task for fine-tuning"),
    "inspect": Command("inspect", "show the experts, parameters and cost of a checkpoint"),
    "launch": Command("launch", "run a fairseq command as several ranks on the CPU"),
    "plot": Command("plot", "plot validation losses and expert loads of training runs"),
    "study": Command("study", "train a grid of routers and seeds, and compare them"),
    "reshard": Command("reshard", "convert a checkpoint between one file and one file per rank"),
    "average": Command("average", "average the weights of checkpoints, or take their EMA"),
    "prune": Command("prune", "remove experts from a checkpoint, by load or by language"),
    "upcycle": Command("upcycle", "convert a dense checkpoint to one with experts"),
    "convert": Command("convert", "convert a checkpoint of another program, or to another dictionary"),
    "export-hf": Command("export_hf", "export a checkpoint to Hugging Face's transformers"),
    "completion": Command("completion", "print a shell completion script"),
}


def build_parser(arguments_of: Optional[str] = None) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of one (None: of all); imports only the modules that it needs."""
    parser = argparse.ArgumentParser(prog="fairseq-sparsemixer", description="Tools for Mixture-of-Experts training in fairseq.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {fairseq_sparsemixer.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module_name, line) in COMMANDS.items():
        command = commands.add_parser(name, help=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if arguments_of in (None, name):
            module = import_module(f"{__name__}.{module_name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one command. Returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    chosen = next((word for word in given if not word.startswith("-")), "")
    options = build_parser(chosen).parse_args(given)
    try:
        return options.run(options) or 0
    except ModuleNotFoundError as error:
        from fairseq_sparsemixer.tools.requirements import without

        sentence = without(error, options.command)
        if sentence is None:
            raise
        raise ConfigurationError(sentence) from None
