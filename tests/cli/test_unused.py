"""No command ignores a flag in silence: one that changes nothing beside the others is refused before any file is read."""

import pytest

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError

PRUNE = ["prune", "in.pt", "out.pt", "--load", "load.jsonl", "--keep", "4"]
STUDY = ["study", "study.yaml", "--out", "out"]
FIDELITY = ["fidelity", "--checkpoint", "m.pt", "--text", "a", "--target", "b"]

UNUSED = {
    "convert seed": (["convert", "a.pt", "b.pt", "--seed", "3"], "--seed 3 is only for --dict, --source-dict and --target-dict"),
    "convert seed, as default": (["convert", "a.pt", "b.pt", "--seed", "1"], "--seed 1 is only for --dict"),
    "convert data": (["convert", "a.pt", "b.pt", "--data", "d"], "--data d is only for --dict"),
    "merge seed": (["convert", "--merge-lora", "a.pt", "b.pt", "--seed", "3"], "--seed 3 is not for --merge-lora"),
    "merge dict": (["convert", "--merge-lora", "a.pt", "b.pt", "--dict", "d"], "--dict d is not for --merge-lora"),
    "prune flags": ([*PRUNE, "--generate-flags", "--beam 4"], "--generate-flags --beam 4 is only for --data"),
    "prune languages": ([*PRUNE, "--languages", "de", "fr"], "--languages de fr is only for --by language"),
    "inspect sentences": (["inspect", "m.pt", "--sentences", "9"], "--sentences 9 is only for --text"),
    "inspect data": (["inspect", "m.pt", "--data-bin", "d"], "--data-bin d is only for --text"),
    "inspect words": (["inspect", "m.pt", "--words", "9"], "--words 9 is only for --trace"),
    "inspect count": (["inspect", "m.pt", "--text", "t", "--min-count", "9"], "--min-count 9 is only for --trace"),
    "trace sentences": (["inspect", "--trace", "t", "--sentences", "9"], "--sentences 9 does not go with --trace t"),
    "trace data": (["inspect", "--trace", "t", "--data-bin", "d"], "--data-bin d does not go with --trace t"),
    "dry run": ([*STUDY, "--dry-run", "--workers", "2"], "--workers 2 changes nothing in a --dry-run"),
    "dry report": ([*STUDY, "--dry-run", "--report-only"], "--report-only changes nothing in a --dry-run"),
    "dry json": ([*STUDY, "--dry-run", "--json", "f"], "--json f changes nothing in a --dry-run"),
    "report": ([*STUDY, "--report-only", "--workers", "2"], "--workers 2 changes nothing with --report-only, which runs nothing"),
    "fidelity seed": ([*FIDELITY, "--seed", "2"], "--seed 2 changes nothing without --draws, with --checkpoint"),
    "expectation": ([*FIDELITY, "--expectation", "--seed", "2"], "--seed 2 changes nothing without --draws, with --checkpoint"),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_a_flag_that_changes_nothing_is_refused(kind):
    arguments, sentence = UNUSED[kind]
    with pytest.raises(ConfigurationError, match=f"^fairseq-sparsemixer: {sentence}.*; leave it out$"):
        main(arguments)
