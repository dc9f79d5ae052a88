"""Fine-tuning on a GLUE task (Wang et al., 2018; arXiv 1804.07461): --task CoLA, SST-2, MRPC, STS-B, QQP, MNLI, QNLI or RTE.

Starts from a model of recipes.electra_base (--pretrained), and reports GLUE's metric on the development set. Download GLUE's
files by hand from gluebenchmark.com/tasks, and pass --raw-dir, with a folder per task.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Dict, Optional

from rich.console import Console

from fairseq_sparsemixer.cli.glue import TASKS, encoder, require_file
from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.progress import script
from recipes.common.segmentation import MODEL
from recipes.common.session import Recipe, Session, entry
from recipes.common.text import last_figures
from recipes.common.training import USER_DIR, age, checkpoint_of, train
from recipes.glue.smoke_data import write_smoke_data

NAME = "glue"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
SIZES = "sizes.json"  # examples per split, in the folder of prepared data
EXAMPLES = 32  # per update
EPOCHS = {"RTE": 10, "STS-B": 10}  # Appendix B of ELECTRA's paper; 3 for the others
WARMUP = 0.1  # share of all updates
TOKENS = EXAMPLES * 512
GROUPS = {"num_classes": "task", "best_checkpoint_metric": "checkpoint", "maximize_best_checkpoint_metric": "checkpoint"}
GROUPS.update(valid_subset="dataset", regression_target="criterion")  # others: the criterion's, not in glue.yaml
SMOKE = {"model._name": "electra_moe_tiny", "task.max_positions": 64, "common.log_interval": 1}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the task and the model to fine-tune."""
    group = parser.add_argument_group("glue")
    group.add_argument("--task", choices=TASKS, default="RTE", metavar="TASK", help=f"{', '.join(TASKS)} (default: %(default)s)")
    group.add_argument(
        "--pretrained", type=Path, metavar="DIR", help="--out of recipes.electra_base (default: runs/electra_base)"
    )
    group.add_argument(
        "--checkpoint", type=Path, metavar="FILE",
        help="model to start from (default: best checkpoint in --pretrained with the same router and number of experts, seed 1)",
    )  # fmt: skip


def prepare(session: Session) -> None:
    """Check the task's TSV files and segment them into the pieces of the pre-trained model."""
    options = enter(session)
    if options.raw_dir is None and not session.small:
        raise ConfigurationError("pass --raw-dir DIR with GLUE's files, from gluebenchmark.com/tasks")
    raw = session.out / "raw" if session.small else options.raw_dir / options.task
    pretrained = pretraining(session)
    settings = {"task": options.task, "raw": str(raw), "pretrained": str(pretrained.resolve())}
    does = f"{'makes a tiny data set' if session.small else 'reads ' + str(raw)}; segments it into the pieces of {pretrained}"
    session.step(f"data: {options.task}", session.data, settings, does, make_data, options.task, raw, session.small, pretrained)


def make_data(task: str, raw: Path, small: bool, pretrained: Path, folder: Path, console: Console) -> None:
    """Make folder/bin and folder/sizes.json."""
    from fairseq.data import Dictionary

    from fairseq_sparsemixer.tools import glue

    if small:
        write_smoke_data(task, raw)
    dictionary = Dictionary.load(str(require_file(pretrained / "data" / "bin" / "dict.txt", "--pretrained")))
    encode = encoder(require_file(pretrained / "data" / "pieces" / MODEL, "--pretrained"))
    skip = (lambda message: console.print(f"skipped: {message}", highlight=False)) if task == "QQP" else None  # has bad lines
    sizes = glue.prepare(task, raw, folder / "bin", dictionary, encode, skip)
    console.print(", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " examples", highlight=False)
    (folder / SIZES).write_text(json.dumps(sizes), encoding="utf-8")


def train_model(session: Session) -> None:
    """Train with the settings of glue.yaml and the task; the number of updates follows from examples and epochs."""
    options = enter(session)
    if session.gpus > 1 or options.nodes > 1:
        raise ConfigurationError("fine-tuning uses one GPU: set --gpus 1, or 0 for the CPU")
    updates = options.updates or number_of_updates(session)
    settings: Dict[str, Any] = {
        **(SMOKE if options.smoke else {}),
        **task_settings(options.task),
        "checkpoint.finetune_from_model": starting_point(session).resolve(),
        "optimization.max_update": updates,
        "lr_scheduler.warmup_updates": math.ceil(WARMUP * updates),
    }
    train(session, CONFIG, session.data / "bin", TOKENS, TOKENS, settings)


def evaluate(session: Session) -> None:
    """Evaluate GLUE's metric for the best checkpoint on each development set."""
    from fairseq_sparsemixer.tools.glue import TASKS as DESCRIPTIONS

    options = enter(session)
    checkpoint = checkpoint_of(session)
    for split in ["valid", "valid1"][: len(DESCRIPTIONS[options.task].valid)]:
        folder = session.out / f"{session.run.name}-{split}"
        command = [script("fairseq-validate"), str(session.data / "bin"), "--user-dir", str(USER_DIR)]
        command += ["--task", "sentence_prediction", "--criterion", "moe_sentence_prediction", "--path", str(checkpoint)]
        command += ["--valid-subset", split, "--batch-size", "32", "--log-format", "json", "--required-batch-size-multiple", "1"]
        command += ["--cpu"] if session.gpus == 0 else []
        title = f"{options.task} on {split}"
        session.command(title, folder, command, {"command": command, "checkpoint": age(checkpoint)})
        if not options.dry_run:
            figures = last_figures(folder / "console.log", partial(read_figures, split=split))
            session.results({"task": options.task, "split": split, **figures}, f"-{split}")


def enter(session: Session) -> argparse.Namespace:
    """Make the session's folder that of the task. Returns the session's options."""
    session.out = session.out / session.options.task
    return session.options


def pretraining(session: Session) -> Path:
    """The output folder of recipes.electra_base."""
    default = Path("runs", "electra_base-smoke" if session.options.smoke else "electra_base")
    return session.options.pretrained or default


def starting_point(session: Session) -> Path:
    """The pre-trained checkpoint. Raises ConfigurationError if it does not exist."""
    options = session.options
    run = session.run.name[: session.run.name.rindex("-seed")] + "-seed1"
    path = options.checkpoint or pretraining(session) / run / "checkpoint_best.pt"
    if not path.is_file() and not options.dry_run:
        raise ConfigurationError(f"{path} not found; train it with recipes.electra_base, or pass --pretrained or --checkpoint")
    return path


def number_of_updates(session: Session) -> int:
    """Updates for the paper's number of epochs. If --dry-run finds no data, assumes one batch per epoch, and says so."""
    session.needs(session.data, "prepare")
    path, epochs = session.data / SIZES, EPOCHS.get(session.options.task, 3)
    if not path.is_file():
        session.say(f"{epochs} epochs; the updates below assume {EXAMPLES} examples, because the task is not prepared yet")
        return epochs
    examples = json.loads(path.read_text(encoding="utf-8"))["train"]
    return math.ceil(examples / EXAMPLES) * epochs


def task_settings(task: str) -> Dict[str, Any]:
    """fairseq's settings for a task and its metric, by group and name."""
    from fairseq_sparsemixer.tools.glue import TASKS as DESCRIPTIONS

    settings: Dict[str, Any] = {}
    if not DESCRIPTIONS[task].classes and not DESCRIPTIONS[task].has_score():  # the metric is the loss; glue.yaml assumes a score
        settings["checkpoint.maximize_best_checkpoint_metric"] = False
    name = ""
    for word in DESCRIPTIONS[task].flags().split():
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            group = GROUPS.get(name, "criterion")
            name = f"{group}.{name}" if name in GROUPS else f"+{group}.{name}"
            settings[name] = True
        else:
            settings[name] = word
    return settings


def read_figures(line: str, split: str) -> Optional[Dict[str, Any]]:
    """The loss and metrics of a split in a line of fairseq-validate's JSON log; None if it has none."""
    if f'"{split}_loss"' not in line:
        return None
    log = json.loads(line[line.index("{") :])
    metrics = ("loss", "accuracy", "f1", "acc_and_f1", "mcc", "pearson", "spearman", "pearson_and_spearman")
    return {name: float(log[f"{split}_{name}"]) for name in metrics if f"{split}_{name}" in log}


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate, add_options)

if __name__ == "__main__":
    entry(RECIPE)
