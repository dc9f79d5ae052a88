"""docs/routers.md: its table lists every router."""

from pathlib import Path

from fairseq_sparsemixer.moe.gates import DENSE, GATES, gate_class, gate_options

OWN_FLAGS = {"jitter_eps": "--jitter-eps", "estimator_at_argmax": "--estimator-at-argmax", "top_k": "--moe-top-k"}
OURS = [name for name, gate in GATES.items() if gate.__module__.startswith("fairseq_sparsemixer.")]  # tests register others
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "routers.md").read_text(encoding="utf-8")


def test_the_table_agrees_with_the_code():
    rows = {}
    for line in TEXT[: TEXT.index("\n## ")].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and "--router" not in cells[0]:
            rows[cells[0].strip("`")] = cells
    assert sorted(rows) == sorted([*OURS, DENSE])
    for name in OURS:
        _, _, k, _, balance, capacity, safe, estimator, flags = rows[name]
        options = gate_options(name)
        for option, flag in OWN_FLAGS.items():
            assert (f"`{flag}`" in flags) == (option in options)
        assert ("any" in k) == ("top_k" in options)
        assert ("bias" in balance) == ("bias_update_rate" in options)
        assert (capacity != "–") == ("capacity_factor" in options)
        assert ("yes" in safe) == gate_class(name).causal
        assert (estimator != "–") == ("gradient_estimator" in options)
