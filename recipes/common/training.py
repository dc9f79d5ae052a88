"""`train`: fairseq-hydra-train with a recipe's YAML file and the same effective batch on any number of devices."""

import json
import os
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import yaml

import fairseq_sparsemixer
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import write_whole
from recipes.common.batch import BatchPlan, plan_batch, plan_blocks
from recipes.common.binarisation import longest_sentence
from recipes.common.progress import Advance, Meter, script
from recipes.common.session import Session
from recipes.common.slurm import batch_script
from recipes.common.steps import begin_step, require_usable

USER_DIR = Path(fairseq_sparsemixer.__file__).parent
BARE = re.compile(r"[\w./\[\]+-]+")  # characters that hydra reads literally
TO_DOUBLE = re.compile(r"\\+(?='|\Z)")  # backslashes before a quote; hydra keeps all others in a quoted string unchanged


def train(
    session: Session,
    config: Path,
    data: Path,
    batch_tokens: int,
    device_tokens: int,
    settings: Optional[Dict[str, Any]] = None,
    smoke: Optional[Tuple[int, Dict[str, Any]]] = None,
) -> None:
    """Train on the binarised `data` with `config` and batch_tokens per update.

    device_tokens: max tokens per GPU at once, unless --device-tokens is given. settings: overrides of the config by group and
    name, such as {"model.dropout": 0.1}. smoke: (batch_tokens, settings) to use instead with --smoke.
    """
    options = session.options
    if smoke is not None and options.smoke:
        batch_tokens, settings = smoke
    settings = dict(settings or {})
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    updates = options.updates or settings.get("optimization.max_update") or content["optimization"]["max_update"]
    block = settings.get("task.tokens_per_sample") or content.get("task", {}).get("tokens_per_sample")
    settings["optimization.max_update"] = updates
    settings.update({"common.seed": options.seed, "model.router": options.router, "model.num_experts": options.num_experts})
    if options.router_option:
        settings["+model.router_option"] = options.router_option
    # defines the run; the number of devices is left out, because it may change when resuming
    identity = {
        "config": config.read_text(encoding="utf-8"),
        "settings": settings,
        "batch_tokens": batch_tokens,
        "data": session.needs(session.data, "prepare"),
    }
    world_size = max(session.gpus, 1) * options.nodes
    plan = _plan(batch_tokens, options.device_tokens or device_tokens, world_size, block, data)
    devices = {
        "common.user_dir": USER_DIR,
        "task.data": data.resolve(),
        "checkpoint.save_dir": session.run.resolve(),
        "dataset.max_tokens": plan.max_tokens,
        "optimization.update_freq": [plan.update_freq],
    }
    if session.gpus == 0:
        devices.update({"common.cpu": True, "common.fp16": False})
    else:
        devices["+distributed_training.distributed_world_size"] = world_size
    command = hydra_command(config, {**settings, **devices})
    split = f"{plan.max_tokens:,} x {plan.update_freq} micro-batches x {world_size} devices"
    session.say(f"at most {plan.tokens:,} tokens per update: {split}")
    require_usable(session.run, identity)  # a run with other settings may have taken days
    if options.slurm is not None:
        _write_slurm(session, command, identity)
    elif options.nodes > 1:
        raise ConfigurationError(f"--nodes {options.nodes} needs --slurm FILE: several machines are started with SLURM's srun")
    else:
        meter = Meter(updates, "updates", read_log_line)
        session.command(f"train {session.run.name}", session.run, command, identity, meter)


def _plan(batch_tokens: int, device_tokens: int, world_size: int, block: Optional[int], data: Path) -> BatchPlan:
    """How a batch is split over devices. block: tokens per block of text; None for sentences.

    Raises ConfigurationError if a device has no room for a block or the longest sentence, which fairseq only asserts.
    """
    if block:
        _require_room(batch_tokens, min(batch_tokens // world_size, device_tokens), world_size, "a block", block)
        return plan_blocks(batch_tokens, device_tokens, world_size, block)
    plan = plan_batch(batch_tokens, device_tokens, world_size)
    _require_room(batch_tokens, plan.max_tokens, world_size, "the longest sentence", longest_sentence(data))
    return plan


def _require_room(batch_tokens: int, room: int, world_size: int, what: str, needed: int) -> None:
    if room < needed:
        crowded = batch_tokens // world_size < needed
        remedy = f"use at most {batch_tokens // needed} devices" if crowded else f"give --device-tokens {2 * needed} or more"
        raise ConfigurationError(
            f"each of {world_size} devices gets {room} of {batch_tokens:,} tokens, less than {what} ({needed} tokens); {remedy}"
        )


def checkpoint_of(session: Session, name: str = "checkpoint_best.pt") -> Path:
    """The path of a checkpoint of the session's run. Raises ConfigurationError if it does not exist."""
    path = session.run / name
    if not path.is_file() and not session.options.dry_run:
        raise ConfigurationError(f"{path} not found; run first: python -m recipes.{session.name} train, with the same options")
    return path


def age(path: Path) -> str:
    """The file's mtime in nanoseconds, as text; empty if it does not exist."""
    return str(path.stat().st_mtime_ns) if path.exists() else ""


def hydra_command(config: Path, settings: Dict[str, Any]) -> List[str]:
    """The fairseq-hydra-train command with overrides of the config file."""
    folder = os.path.relpath(config.parent)
    folder = folder if not folder.startswith("..") else str(config.parent)
    command = [script("fairseq-hydra-train"), "--config-dir", folder, "--config-name", config.stem]
    return command + [f"{name}={as_override(value)}" for name, value in settings.items()]


def as_override(value: Any) -> str:
    """A value in hydra's override syntax."""
    if value is None:
        return "null"
    text = json.dumps(value, separators=(",", ":")) if isinstance(value, (bool, list, int, float)) else str(value)
    if BARE.fullmatch(text) or isinstance(value, list):
        return text
    return "'" + TO_DOUBLE.sub(lambda found: 2 * found[0], text).replace("'", "\\'") + "'"


def read_log_line(line: str) -> Optional[Advance]:
    """The progress in a line of fairseq's JSON log, if any."""
    if "train_inner" not in line or "{" not in line:
        return None
    log = json.loads(line[line.index("{") :])
    return Advance(int(log["num_updates"]), f"loss {log['loss']}, {float(log.get('wps', 0)):,.0f} words/s")


def _write_slurm(session: Session, command: List[str], identity: Dict[str, Any]) -> None:
    options = session.options
    if session.gpus < 1:
        raise ConfigurationError("--slurm needs --gpus N, the GPUs per machine")
    text = batch_script(f"{session.name}-{session.run.name}", command, options.nodes, session.gpus, session.run.resolve())
    if options.dry_run:
        session.console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    begin_step(session.run, identity)
    write_whole(options.slurm, text)
    session.say(f"[green]✓[/] submit it with: sbatch {options.slurm}")
