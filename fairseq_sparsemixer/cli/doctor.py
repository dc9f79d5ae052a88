"""Show versions and devices, what works here and what will not, and what to do about it.

The exit status is 1 when something is broken; what is merely limited leaves it at 0.

examples:
  fairseq-sparsemixer doctor
  fairseq-sparsemixer doctor --json doctor.json
"""

import argparse
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from fairseq_sparsemixer.cli.json_file import write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to write it."""
    parser.add_argument("--json", metavar="FILE", help="write the findings")


def run(options: argparse.Namespace) -> int:
    """Diagnose, print, write; 1 when something is broken."""
    from fairseq_sparsemixer.tools.diagnosis import BROKEN, diagnose  # loads torch

    findings = diagnose()
    table = Table("", "state", "found", "remedy", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for finding in findings:
        table.add_row(finding.subject, finding.state, finding.found, finding.remedy)
    Console().print(table)
    if options.json:
        write_json(options.json, {"findings": [asdict(finding) for finding in findings]})
    return int(any(finding.state == BROKEN for finding in findings))
