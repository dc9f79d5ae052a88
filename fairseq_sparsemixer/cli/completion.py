"""Print a shell script that completes commands, flags, files and folders on the Tab key.

It is generated from the installed commands: print it again after an upgrade.

examples:
  fairseq-sparsemixer completion bash > ~/.fairseq-sparsemixer.bash     # then, in ~/.bashrc: source ~/.fairseq-sparsemixer.bash
  fairseq-sparsemixer completion zsh > DIR/_fairseq-sparsemixer         # DIR: a folder in $fpath
"""

import argparse

SHELLS = ("bash", "zsh", "tcsh")
FILES = ("FILE", "CHECKPOINT", "SPEC", "IN", "OUT", "SRC", "DST", "DENSE")  # metavars of files
FOLDERS = ("DIR", "RUN_DIR", "OUTDIR")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")


def run(options: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    from fairseq_sparsemixer.cli import build_parser

    parser = build_parser()
    _mark_paths(parser, {**dict.fromkeys(FILES, shtab.FILE), **dict.fromkeys(FOLDERS, shtab.DIRECTORY)})
    print(shtab.complete(parser, options.shell))


def _mark_paths(parser: argparse.ArgumentParser, by_metavar: dict) -> None:
    """Tell shtab which arguments of the parser and its commands are paths."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark_paths(command, by_metavar)
        elif action.metavar in by_metavar:
            action.complete = by_metavar[action.metavar]  # type: ignore[attr-defined]  # read by shtab
