"""Steps that can be interrupted: a finished one is skipped, one whose settings changed starts over."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Callable, Dict

from rich.console import Console

STAMP = "step.json"


def run_step(title: str, folder: Path, settings: Dict[str, Any], console: Console, action: Callable, *arguments: Any) -> str:
    """Fill folder by action(*arguments, folder, console) unless that was done before under the same settings.

    Returns a fingerprint of the settings, to be among those of later steps.
    After a kill, action finds in the folder what was there: it goes on if it can. Other settings empty the folder first.
    """
    stamp = folder / STAMP
    text = json.dumps(settings, sort_keys=True, default=str)
    fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
    before = _read(stamp)
    if before == {"settings": fingerprint, "finished": True}:
        console.print(f"[green]✓[/] {title} [dim](done before, in {folder})[/]")
        return fingerprint
    if before.get("settings") != fingerprint:
        shutil.rmtree(folder, ignore_errors=True)
    console.rule(f"[bold]{title}[/]", align="left")
    folder.mkdir(parents=True, exist_ok=True)
    _write(stamp, {"settings": fingerprint, "finished": False})
    action(*arguments, folder, console)
    _write(stamp, {"settings": fingerprint, "finished": True})
    return fingerprint


def _read(stamp: Path) -> Dict[str, Any]:
    try:
        return json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none, or cut short: as if nothing had been done
        return {}


def _write(stamp: Path, content: Dict[str, Any]) -> None:
    part = stamp.with_suffix(".part")
    part.write_text(json.dumps(content), encoding="utf-8")
    part.replace(stamp)
