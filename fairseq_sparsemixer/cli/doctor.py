"""Show what works on this machine and what does not, with a remedy for each problem, and what is changed in fairseq.

The exit status is 1 if something is broken; it stays 0 if something is only limited.

examples:
  fairseq-sparsemixer doctor
  fairseq-sparsemixer doctor --json doctor.json
"""

import argparse
from dataclasses import asdict
from typing import Dict, List

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from fairseq_sparsemixer.cli.json_file import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", metavar="FILE", help="also write the findings to this file")


def run(options: argparse.Namespace) -> int:
    """Diagnose, print, write. Returns 1 if something is broken."""
    from fairseq_sparsemixer.tools.diagnosis import BROKEN, diagnose  # loads torch

    findings = diagnose()
    table = Table("", "state", "found", "remedy", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for finding in findings:
        table.add_row(finding.subject, finding.state, finding.found, finding.remedy)
    console = Console()
    console.print(table)
    patches = applied_patches()
    if patches:
        changed = Table(
            Column("changed in fairseq, torch or numpy", overflow="fold"),
            "otherwise",
            "until",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for patch in patches:
            changed.add_row(escape(patch["target"]), patch["why"], patch["until"])
        console.print(changed)
    if options.json:
        write_json(options.json, {"findings": [asdict(finding) for finding in findings], "patches": patches})
    return int(any(finding.state == BROKEN for finding in findings))


def applied_patches() -> List[Dict[str, str]]:
    """target, why and until of every patch; empty if fairseq cannot be imported."""
    try:
        from fairseq_sparsemixer.plugin.patches import PATCHES
    except (ImportError, OSError, AttributeError):  # a finding above says why
        return []
    return [{"target": patch.target, "why": patch.why, "until": patch.until} for patch in PATCHES]
