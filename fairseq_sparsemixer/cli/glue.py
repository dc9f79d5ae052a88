"""Prepare a GLUE task for fine-tuning: convert its TSV files to the vocabulary of a pre-trained model.

Prints fairseq-train's flags for the task and its metric.

example:
  fairseq-sparsemixer glue CoLA --raw-dir glue/CoLA --dict bin/wiki/dict.txt --sentencepiece-model spm.model --dest-dir bin/CoLA
"""

import argparse
import sys
from pathlib import Path
from typing import Callable, Optional

from fairseq_sparsemixer.cli.folder import folder
from fairseq_sparsemixer.errors import ConfigurationError

TASKS = ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The task, where its files are, and how the pre-trained model reads text."""
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    parser.add_argument("--raw-dir", type=Path, required=True, metavar="DIR", help="folder of the task's TSV files")
    parser.add_argument("--dict", type=Path, required=True, metavar="FILE", help="dict.txt of the pre-trained model")
    parser.add_argument("--dest-dir", type=folder, required=True, metavar="DIR", help="folder to write, input of fairseq-train")
    parser.add_argument(
        "--sentencepiece-model", type=Path, metavar="FILE", help="splits sentences into pieces (default: split at whitespace)"
    )
    parser.add_argument("--skip-bad-lines", action="store_true", help="skip lines that are not examples, and report them")


def encoder(model: Optional[Path]) -> Callable[[str], str]:
    """A function: sentence -> words separated by spaces."""
    if model is None:
        return lambda sentence: " ".join(sentence.split())
    from sentencepiece import SentencePieceProcessor

    require_file(model, "--sentencepiece-model")
    try:
        pieces = SentencePieceProcessor(model_file=str(model))
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"--sentencepiece-model {model} is not a sentencepiece model ({error})") from None
    return lambda sentence: " ".join(pieces.encode(sentence, out_type=str))


def require_file(path: Path, flag: str) -> Path:
    """Return the path. Raises ConfigurationError if it is not a file."""
    try:
        there = path.is_file()
    except (OSError, ValueError):  # not a valid file name
        there = False
    if not there:
        raise ConfigurationError(f"{flag} {str(path)[:300]} does not exist, or is not a file; give another path")
    return path


def run(options: argparse.Namespace) -> None:
    """Prepare the task; print the number of examples per split, and the flags for it."""
    from fairseq.data import Dictionary

    from fairseq_sparsemixer.tools import glue

    require_file(options.dict, "--dict")
    try:
        dictionary = Dictionary.load(str(options.dict))
    except Exception as error:  # fairseq raises many types, Exception itself among them
        raise ConfigurationError(f"--dict {options.dict} is not a fairseq dictionary ({str(error)[:300]})") from None
    if len(dictionary) == dictionary.nspecial:
        raise ConfigurationError(f"--dict {options.dict} has no words; give the dict.txt of the pre-trained model")
    skip = (lambda message: print(message, file=sys.stderr)) if options.skip_bad_lines else None
    counts = glue.prepare(options.task, options.raw_dir, options.dest_dir, dictionary, encoder(options.sentencepiece_model), skip)
    for split, count in counts.items():
        print(f"{options.dest_dir} {split}: {count} examples")
    task = glue.TASKS[options.task]
    if not task.has_score():
        print(f"the installed fairseq does not compute GLUE's metric for {options.task}: checkpoints are chosen by"
              f" {'accuracy' if task.classes else 'loss'}", file=sys.stderr)  # fmt: skip
    print(f"flags for fairseq-train: {task.flags()}")
