"""Steps that can be interrupted: a finished one is skipped, one whose settings changed starts over."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

from rich.console import Console

from fairseq_sparsemixer.files import write_whole

STAMP = "step.json"
STARTS_OVER = "starts over, as settings changed"


def run_step(title: str, folder: Path, settings: Dict[str, Any], console: Console, action: Callable, *arguments: Any) -> str:
    """Fill folder by action(*arguments, folder, console) unless that was done before under the same settings.

    Returns a fingerprint of the settings, to be among those of later steps.
    After a kill, action finds in the folder what was there: it goes on if it can. Other settings empty the folder first.
    """
    mark = _hash(settings)
    if _read(folder) == {"settings": mark, "finished": True}:
        console.print(f"[green]✓[/] {title} [dim](done before, in {folder})[/]")
        return mark
    console.rule(f"[bold]{title}[/]", align="left")
    begin_step(folder, settings)
    action(*arguments, folder, console)
    write_whole(folder / STAMP, json.dumps({"settings": mark, "finished": True}))
    return mark


def begin_step(folder: Path, settings: Dict[str, Any]) -> None:
    """Make the folder that of an unfinished step of these settings; that of other settings is emptied."""
    mark = _hash(settings)
    if _read(folder).get("settings") != mark:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / STAMP, json.dumps({"settings": mark, "finished": False}))


def state_of(folder: Path, settings: Dict[str, Any]) -> str:
    """What run_step would do, in words."""
    before = _read(folder)
    if before.get("settings") == _hash(settings):
        return "done before" if before.get("finished") else "goes on"
    return STARTS_OVER if before else "to do"


def finished(folder: Path) -> bool:
    """Whether a step has filled the folder."""
    return bool(_read(folder).get("finished"))


def fingerprint(folder: Path) -> str:
    """That of the settings of the step that filled the folder; empty where there was none."""
    return _read(folder).get("settings", "")


def _hash(settings: Dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _read(folder: Path) -> Dict[str, Any]:
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut short: as if nothing had been done
        return {}
