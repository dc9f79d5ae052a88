"""Converts GLUE's TSV files (Wang et al., 2018; arXiv 1804.07461) to the folders read by fairseq's sentence_prediction task.

A task's folders are `input0`, `input1` if its inputs are sentence pairs, and `label`, each with splits train, valid and test.
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

STS_B_MAXIMUM = 5.0  # similarities are from 0 to 5; a model learns them divided by 5, as fairseq's RoBERTa does

ACCURACY = "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric"
MATTHEWS = "--report-mcc --best-checkpoint-metric mcc --maximize-best-checkpoint-metric"
ACCURACY_AND_F1 = "--report-acc-and-f1 --best-checkpoint-metric acc_and_f1 --maximize-best-checkpoint-metric"
CORRELATIONS = (
    "--regression-target --report-pearson-and-spearman --best-checkpoint-metric pearson_and_spearman"
    " --maximize-best-checkpoint-metric"
)
LOSS = "--regression-target --best-checkpoint-metric loss"

SKIP = "correct it, or use --skip-bad-lines"  # remedy for a bad line


@dataclass(frozen=True)
class GlueTask:
    """The format of a task's files, and its metric.

    inputs, label: column names. classes: the labels, in the order of their numbers; empty for regression.
    score: fairseq-train's flags for GLUE's metric. columns: of train and dev, if these files have no header.
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
        """fairseq-train's flags for the task."""
        splits = " --valid-subset valid,valid1" if len(self.valid) > 1 else ""
        score = self.score if self.has_score() else ACCURACY if self.classes else LOSS
        return f"--num-classes {max(len(self.classes), 1)} {score}{splits}"

    def has_score(self) -> bool:
        """Whether the installed fairseq computes GLUE's metric for the task; 0.12.2 has only accuracy and loss."""
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
    """One line: its sentences and its label, which is None in a test split."""

    inputs: List[str]
    label: Optional[str]


class BadLine(ConfigurationError):
    """A line that is not an example; the message begins with file and line number."""


def read_examples(path: Path, task: GlueTask, labelled: bool, skip: Optional[Callable[[str], None]] = None) -> Iterator[Example]:
    """The examples of one TSV file. If `skip` is given, bad lines are left out, and it is called with each one's error.

    Raises ConfigurationError for a missing file or column, BadLine for a line that is not an example.
    """
    if not _is_file(path):
        raise ConfigurationError(f"{str(path)[:300]} is missing, or not a file; give a folder with GLUE's {path.name}")
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
        raise BadLine(f"{where} not UTF-8 ({error.reason} at byte {error.start}); convert the file to UTF-8") from None


def _check_header(fields: List[str], needed: List[str], where: str) -> List[str]:
    for name in needed:
        if fields.count(name) > 1:
            raise ConfigurationError(f"{where} two columns {name!r}; remove one")
        if name not in fields:
            raise ConfigurationError(f"{where} no column {name!r} among {', '.join(fields)[:300]}; give the file of this task")
    return fields


def _example(fields: List[str], columns: List[str], task: GlueTask, labelled: bool, where: str) -> Example:
    if len(fields) != len(columns):
        raise BadLine(f"{where} {len(fields)} columns instead of {len(columns)}; {_remedy(labelled)}")
    row = dict(zip(columns, fields))
    for name in task.inputs:
        if labelled and not row[name].strip():  # every line of a test file must be answered
            raise BadLine(f"{where} column {name!r} is empty; {_remedy(labelled)}")
    return Example([row[name] for name in task.inputs], _label(row[task.label], task, where) if labelled else None)


def _remedy(labelled: bool) -> str:
    return SKIP if labelled else "correct it; answers are numbered by line, so no line can be skipped"


def _label(text: str, task: GlueTask, where: str) -> str:
    if task.classes:
        if text not in task.classes:
            raise BadLine(f"{where} label {text[:40]!r} is not one of {', '.join(task.classes)}; {SKIP}")
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= STS_B_MAXIMUM:
        raise BadLine(f"{where} score {text[:40]!r} is not a number from 0 to {STS_B_MAXIMUM:g}; {SKIP}")
    return repr(value / STS_B_MAXIMUM)


def prepare(
    name: str,
    raw_dir: Path,
    destination: Path,
    dictionary: Dictionary,
    encode: Callable[[str], str],
    skip: Optional[Callable[[str], None]] = None,
) -> Dict[str, int]:
    """Convert the task `name` of TASKS from raw_dir to destination. Returns the number of examples per split.

    `encode` turns a sentence into words of the dictionary, separated by spaces. Test splits are optional, and keep every
    line. See read_examples for `skip` and errors; all files are read before anything is written.
    """
    task = TASKS[name]
    splits = {
        split: list(read_examples(path, task, labelled, skip if labelled else None))  # answers are numbered by line
        for split, path, labelled in _files(task, raw_dir)
    }
    for split, path, _ in _files(task, raw_dir):
        if not splits[split]:
            raise ConfigurationError(f"{path} has no examples for the {split} split of {name}; give a file with examples")
    with _moved_when_whole(destination) as folder:
        for split, examples in splits.items():
            for index in range(len(task.inputs)):
                lines = [encode(example.inputs[index]) for example in examples]
                _write_tokens(folder / f"input{index}", split, lines, dictionary)
            _write_labels(folder / "label", split, [example.label for example in examples], task)
    return {split: len(examples) for split, examples in splits.items()}


@contextmanager
def _moved_when_whole(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved to `destination` once all are written; otherwise nothing changes there.

    Raises ConfigurationError if they cannot be written.
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
            shutil.rmtree(temporary, ignore_errors=True)  # created by mkdtemp, so it is ours


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # not a valid file name
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
        _write_tokens(folder, split, cast(List[str], labels), classes)  # either all labels are None or none is
    else:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.label").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
