"""`fairseq-sparsemixer doctor`: its findings, JSON file and exit status."""

import json

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.tools import diagnosis


def test_a_working_installation_exits_with_zero_and_writes_the_findings(tmp_path, capsys):
    assert main(["doctor", "--json", str(tmp_path / "d.json")]) == 0
    findings = {finding["subject"]: finding for finding in json.loads((tmp_path / "d.json").read_text())["findings"]}
    assert findings["cpu"]["state"] == "ok" and "a layer trains" in findings["cpu"]["found"]
    assert "transformer_moe" in findings["models"]["found"]


def test_a_broken_installation_exits_with_one(monkeypatch, capsys):
    monkeypatch.setattr(diagnosis, "check_fairseq", lambda: diagnosis.Finding("fairseq", diagnosis.BROKEN, "none", "get one"))
    assert main(["doctor"]) == 1
    assert "get one" in capsys.readouterr().out
