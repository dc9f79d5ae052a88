"""The command lines of a study's runs."""

import sys
from pathlib import Path
from typing import Any, Dict, List

import torch

import fairseq_sparsemixer
from fairseq_sparsemixer.tools.runs import LOAD_LOG, TRAIN_LOG
from fairseq_sparsemixer.tools.study.grid import PROGRAMS, Run, Study

USER_DIR = str(Path(fairseq_sparsemixer.__file__).parent)
MODULES = {"fairseq-train": "train", "fairseq-generate": "generate", "fairseq-eval-lm": "eval_lm"}
CHECKPOINTS, RESULT, COMMAND = "checkpoints", "result.json", "command.txt"
BEST = f"{CHECKPOINTS}/checkpoint_best.pt"


def as_arguments(flags: Dict[str, Any]) -> List[str]:
    """{"lr": 0.1, "bf16": True, "cpu": False} -> ["--lr", "0.1", "--bf16"]; a list becomes several values."""
    arguments: List[str] = []
    for name, value in flags.items():
        if value is False or value is None:
            continue
        arguments.append(f"--{name}")
        if value is not True:
            arguments += [str(item) for item in (value if isinstance(value, list) else [value])]
    return arguments


def train_command(study: Study, run: Run, folder: Path) -> List[str]:
    """fairseq-train for one run; it writes below `folder` only."""
    ours = {
        "user-dir": study.user_dir or USER_DIR,
        "num-experts": run.num_experts,
        "seed": run.seed,
        "save-dir": folder / CHECKPOINTS,
        "log-file": folder / TRAIN_LOG,
        "log-format": "json",
        "moe-load-file": folder / LOAD_LOG,
        "cpu": not torch.cuda.is_available(),
    }
    return ["fairseq-train", str(study.data), *as_arguments({**ours, **run.flags})]


def test_command(study: Study, folder: Path) -> List[str]:
    """The command that scores the best checkpoint of a run on the test split."""
    assert study.test is not None
    program = PROGRAMS[study.test.metric]
    ours = {
        "user-dir": study.user_dir or USER_DIR,
        "path": folder / BEST,
        "gen-subset": "test",
        "cpu": not torch.cuda.is_available(),
        "task": study.flags.get("task"),
    }
    return [program, str(study.data), *as_arguments({**ours, **study.test.flags})]


def executable(command: List[str]) -> List[str]:
    """The same command run by this Python, regardless of PATH."""
    return [sys.executable, "-m", f"fairseq_cli.{MODULES[command[0]]}", *command[1:]]
