"""GLUE's TSV files (Wang et al., 2018; arXiv 1804.07461) as the folders that fairseq's sentence_prediction task reads.

A task becomes `input0`, for pairs of sentences `input1`, and `label`, each with the splits train, valid and test.
"""

import errno
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, cast

import torch
from fairseq.criterions.sentence_prediction import SentencePredictionConfig
from fairseq.data import Dictionary, indexed_dataset

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import finish

STS_B_MAXIMUM = 5.0  # similarities lie between 0 and 5; a model learns them divided by it, as fairseq's RoBERTa does

ACCURACY = "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric"
MATTHEWS = "--report-mcc --best-checkpoint-metric mcc --maximize-best-checkpoint-metric"
ACCURACY_AND_F1 = "--report-acc-and-f1 --best-checkpoint-metric acc_and_f1 --maximize-best-checkpoint-metric"
CORRELATIONS = (
    "--regression-target --report-pearson-and-spearman --best-checkpoint-metric pearson_and_spearman"
    " --maximize-best-checkpoint-metric"
)
LOSS = "--regression-target --best-checkpoint-metric loss"


@dataclass(frozen=True)
class GlueTask:
    """How a task's files look, and what it is scored by.

    inputs, label: names of columns. classes: the labels, in the order of their numbers; none for regression.
    score: fairseq-train's flags for GLUE's metric. columns: those of train and dev where the files have no header.
    valid, test: file names without .tsv, in the order of fairseq's splits valid, valid1, test, test1.
    """

    inputs: Tuple[str, ...]
    label: str
    classes: Tuple[str, ...]
    score: str
    columns: Optional[Tuple[str, ...]] = None
    valid: Tuple[str, ...] = ("dev",)
    test: Tuple[str, ...] = ("test",)

    def flags(self) -> str:
        """What fairseq-train needs to know of the task."""
        splits = " --valid-subset valid,valid1" if len(self.valid) > 1 else ""
        score = self.score if self.has_score() else ACCURACY if self.classes else LOSS
        return f"--num-classes {max(len(self.classes), 1)} {score}{splits}"

    def has_score(self) -> bool:
        """Whether the installed fairseq computes GLUE's metric for the task; 0.12.2 knows accuracy and loss alone."""
        names = [word[2:].replace("-", "_") for word in self.score.split() if word.startswith("--report-")]
        return all(hasattr(SentencePredictionConfig, name) for name in names)


TASKS: Dict[str, GlueTask] = {
    "CoLA": GlueTask(("sentence",), "label", ("0", "1"), MATTHEWS, columns=("source", "label", "note", "sentence")),
    "SST-2": GlueTask(("sentence",), "label", ("0", "1"), ACCURACY),
    "MRPC": GlueTask(("#1 String", "#2 String"), "Quality", ("0", "1"), ACCURACY_AND_F1),
    "STS-B": GlueTask(("sentence1", "sentence2"), "score", (), CORRELATIONS),
    "QQP": GlueTask(("question1", "question2"), "is_duplicate", ("0", "1"), ACCURACY_AND_F1),
    "MNLI": GlueTask(
        ("sentence1", "sentence2"),
        "gold_label",
        ("contradiction", "neutral", "entailment"),
        ACCURACY,
        valid=("dev_matched", "dev_mismatched"),
        test=("test_matched", "test_mismatched"),
    ),
    "QNLI": GlueTask(("question", "sentence"), "label", ("entailment", "not_entailment"), ACCURACY),
    "RTE": GlueTask(("sentence1", "sentence2"), "label", ("entailment", "not_entailment"), ACCURACY),
}


class Example(NamedTuple):
    """One line: its sentences, and its label; None in a test split."""

    inputs: List[str]
    label: Optional[str]


class BadLine(ConfigurationError):
    """A line that is not an example: the message begins with file and line."""


def read_examples(path: Path, task: GlueTask, labelled: bool, skip: Optional[Callable[[str], None]] = None) -> Iterator[Example]:
    """The examples of one TSV file. `skip`, when given, is told of each bad line, which is then left out.

    Raises ConfigurationError for a missing file or column, BadLine for a line that is not an example.
    """
    if not _is_file(path):
        raise ConfigurationError(f"{str(path)[:300]} is missing, or no file; give the path of a folder with GLUE's {path.name}")
    needed = [*task.inputs, *([task.label] if labelled else [])]
    columns = list(task.columns) if task.columns and labelled else None
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}:"
            try:
                fields = _decode(raw, where).split("\t")
                if columns is None:
                    columns = _check_header(fields, needed, where)
                    continue
                yield _example(fields, columns, task, labelled, where)
            except BadLine as error:
                if skip is None:
                    raise
                skip(str(error))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig").rstrip("\r\n")  # MRPC's files begin with a byte order mark
    except UnicodeDecodeError as error:
        raise BadLine(f"{where} no UTF-8 text ({error.reason} at byte {error.start}); convert the file to UTF-8") from None


def _check_header(fields: List[str], needed: List[str], where: str) -> List[str]:
    for name in needed:
        if fields.count(name) > 1:
            raise ConfigurationError(f"{where} two columns {name!r}; take one out")
        if name not in fields:
            raise ConfigurationError(f"{where} no column {name!r} among {', '.join(fields)[:300]}; give the file of this task")
    return fields


def _example(fields: List[str], columns: List[str], task: GlueTask, labelled: bool, where: str) -> Example:
    if len(fields) != len(columns):
        raise BadLine(f"{where} {len(fields)} columns where {len(columns)} are expected; {_remedy(labelled)}")
    row = dict(zip(columns, fields))
    for name in task.inputs:
        if labelled and not row[name].strip():  # a test file's lines are all to be answered
            raise BadLine(f"{where} column {name!r} is empty; {_remedy(labelled)}")
    return Example([row[name] for name in task.inputs], _label(row[task.label], task, where) if labelled else None)


def _remedy(labelled: bool) -> str:
    return "correct or --skip-bad-lines" if labelled else "correct it: answers are numbered by line, and none can be skipped"


def _label(text: str, task: GlueTask, where: str) -> str:
    if task.classes:
        if text not in task.classes:
            raise BadLine(f"{where} label {text[:40]!r} is none of {', '.join(task.classes)}; correct or --skip-bad-lines")
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= STS_B_MAXIMUM:
        raise BadLine(f"{where} score {text[:40]!r} is not a number from 0 to {STS_B_MAXIMUM:g}; correct or --skip-bad-lines")
    return repr(value / STS_B_MAXIMUM)


def prepare(
    name: str,
    raw_dir: Path,
    destination: Path,
    dictionary: Dictionary,
    encode: Callable[[str], str],
    skip: Optional[Callable[[str], None]] = None,
) -> Dict[str, int]:
    """Write the task `name` of TASKS from raw_dir to destination; the number of examples of each split.

    `encode` turns a sentence into the words of the dictionary, separated by blanks. Test splits are taken where there
    are any, with every line. For `skip` and errors see read_examples; all files are read before anything is written.
    """
    task = TASKS[name]
    splits = {
        split: list(read_examples(path, task, labelled, skip if labelled else None))  # answers are numbered by line
        for split, path, labelled in _files(task, raw_dir)
    }
    for split, path, _ in _files(task, raw_dir):
        if not splits[split]:
            raise ConfigurationError(f"{path} has no example for the {split} split of {name}; give one with examples")
    with _moved_when_whole(destination) as folder:
        for split, examples in splits.items():
            for index in range(len(task.inputs)):
                lines = [encode(example.inputs[index]) for example in examples]
                _write_tokens(folder / f"input{index}", split, lines, dictionary)
            _write_labels(folder / "label", split, [example.label for example in examples], task)
    return {split: len(examples) for split, examples in splits.items()}


@contextmanager
def _moved_when_whole(destination: Path) -> Iterator[Path]:
    """A new folder beside `destination` whose files get their places there once all are written; else nothing changes there.

    Raises ConfigurationError where they cannot be written.
    """
    temporary = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if destination.exists() and not destination.is_dir():
            raise FileExistsError(errno.EEXIST, "it is not a folder")
        temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        yield temporary
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            place = destination / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            finish(str(path), str(place))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"--dest-dir {str(destination)[:300]} cannot be written ({reason}); give another folder"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)  # mkdtemp has made it: nobody else's


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _files(task: GlueTask, raw_dir: Path) -> Iterator[Tuple[str, Path, bool]]:
    """(split, file, whether it has labels)."""
    yield "train", raw_dir / "train.tsv", True
    for index, stem in enumerate(task.valid):
        yield f"valid{index or ''}", raw_dir / f"{stem}.tsv", True
    for index, stem in enumerate(task.test):
        if os.path.lexists(raw_dir / f"{stem}.tsv"):
            yield f"test{index or ''}", raw_dir / f"{stem}.tsv", False


def _write_tokens(folder: Path, split: str, lines: List[str], dictionary: Dictionary) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    dictionary.save(str(folder / "dict.txt"))
    prefix = str(folder / split)
    builder = indexed_dataset.make_builder(f"{prefix}.bin", impl="mmap", vocab_size=len(dictionary))
    for line in lines:
        builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).to(torch.int32))
    builder.finalize(f"{prefix}.idx")


def _write_labels(folder: Path, split: str, labels: List[Optional[str]], task: GlueTask) -> None:
    if labels[0] is None:
        return
    if task.classes:
        classes = Dictionary()
        for label in task.classes:
            classes.add_symbol(label)
        _write_tokens(folder, split, cast(List[str], labels), classes)  # all of them, or none, are None
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.label").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
