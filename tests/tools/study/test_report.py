"""The report, from the committed results of earlier versions."""

import json
from pathlib import Path

import pytest

from fairseq_sparsemixer.tools.study import report
from fairseq_sparsemixer.tools.study.analysis import analysed

COMMITTED = sorted(Path(__file__).parents[3].glob("recipes/*/results/*/results.json"))


def columns(table):
    """{header: cells below it} of the first table in a text."""
    lines = [line for line in table.split("\n\n")[1].splitlines() if not line.startswith("|--") and "| ---" not in line]
    return {header: cells for header, *cells in zip(*([cell.strip() for cell in line.split("|")] for line in lines))}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: "/".join(path.parts[-4:-1]))
def test_results_of_earlier_versions_render(path):
    old = json.loads(path.read_text(encoding="utf-8"))
    written = columns(path.with_name("results.md").read_text(encoding="utf-8"))
    shown = columns(report.markdown(analysed(old)))
    assert {"router", "valid loss", "test", "p", "seconds", "load max/mean"} <= {*shown} & {*written}
    assert all(shown[header] == written[header] for header in {*shown} & {*written})
    assert "### Headroom" in report.markdown(analysed(old))


def test_there_are_committed_results():
    assert len(COMMITTED) >= 3
