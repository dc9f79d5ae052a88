"""Any malformed input gives a one-line error that names the flag or file, and no file of the user is lost."""

import json
from pathlib import Path

import malformed
import pytest
import torch
import yaml
from sandbox import fault_of

from fairseq_sparsemixer.cli import main

pytestmark = pytest.mark.sweep

TRAIN_LOG = [
    {"epoch": 1, "update": 0.5, "loss": "5.1", "wps": "100", "wpb": "50", "num_updates": "1"},
    {"epoch": 1, "valid_loss": "5.0", "valid_num_updates": "1"},
    {"epoch": 2, "update": 1.5, "loss": "4.9", "wps": "110", "wpb": "50", "num_updates": "2"},
]
LOAD_LOG = [
    {"num_updates": 1, "layers": ["encoder.layers.0"], "load": [[3, 4]]},
    {"num_updates": 2, "layers": ["encoder.layers.0"], "load": [[5, 2]]},
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, corpus):
    """(folder, commands, files): valid arguments for every command, and those of them that are input files."""
    import runs

    folder = tmp_path_factory.mktemp("inputs")
    for name, router in (("moe", "sparsemixer"), ("dense", "dense")):
        runs.train(corpus, folder / name, "--router", router, updates=1)
    (folder / "a.de").write_text("w1 w2 w3\n")
    moe, dense = str(folder / "moe" / "checkpoint_last.pt"), str(folder / "dense" / "checkpoint_last.pt")
    text, out = str(folder / "a.de"), str(folder / "new")
    run = folder / "run"
    run.mkdir()
    for name, lines in (("train.log", TRAIN_LOG), ("load.jsonl", LOAD_LOG)):
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").write_text("sentence1\tsentence2\tscore\nw1\tw2\t2.5\n")
    spec = {
        "title": "A study", "data": str(corpus), "baseline": "switch", "num-experts": [2], "seeds": [1, 2],
        "flags": {"task": "translation", "arch": "transformer_moe_tiny", "max-update": 2, "lr": 0.01, "optimizer": "adam"},
        "routers": {"dense": {"router": "dense"}, "switch": {"router": "switch"}},
        "test": {"metric": "bleu", "reference": text, "flags": {"beam": 2}},
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(spec))
    commands = {
        "fidelity": ["--tokens", "4", "--num-experts", "3", "--model-dim", "4", "--draws", "8"],
        "inspect": [moe, "--text", text, "--target", text, "--data-bin", str(corpus)],
        "reshard": ["--expert-parallel-size", "2", moe, out],
        "upcycle": ["--num-experts", "2", dense, out],
        "study": [str(folder / "study.yaml"), "--out", str(folder / "study"), "--dry-run"],
        "launch": ["--nproc", "1", "--", "true"],
        "plot": [str(run), "--out", str(folder / "plots")],
        "glue": ["STS-B", "--raw-dir", str(folder), "--dict", str(corpus / "dict.de.txt"), "--dest-dir", str(folder / "glue")],
        "convert": [moe, out],
    }
    files = {
        "inspect": [moe, text], "reshard": [moe], "upcycle": [dense], "study": [str(folder / "study.yaml")],
        "convert": [moe], "plot": [str(run)], "glue": [str(folder), str(corpus / "dict.de.txt")],
    }  # fmt: skip
    return folder, commands, files, spec


def assert_sentences(cases, folder: Path, capsys) -> None:
    """Run all cases, print the counts, and fail with a list of all faults."""
    counts, faults = {"refused": 0, "passed": 0, "fault": 0}, []
    for case in cases:
        verdict, said = fault_of(case, folder, main)
        counts[verdict] += 1
        if verdict == "fault":
            faults.append(f"{case.name}: {said}")
    with capsys.disabled():
        print(
            f"\n{sum(counts.values())} inputs: {counts['refused']} refused, {counts['passed']} accepted, {counts['fault']} faults"
        )
    assert not faults, "\n".join(faults)


def test_number_flags(inputs, capsys):
    folder, commands, _, _ = inputs
    commands = {name: commands[name] for name in ("fidelity", "inspect", "reshard", "upcycle", "study", "launch")}
    assert_sentences(malformed.number_flags(commands), folder, capsys)


def test_input_paths(inputs, tmp_path, capsys):
    folder, commands, files, _ = inputs
    assert_sentences(malformed.paths(commands, files, tmp_path), folder, capsys)


def test_output_paths(inputs, tmp_path, capsys):
    folder, commands, _, _ = inputs
    flags = {
        "fidelity": ["--json", "--png"],
        "inspect": ["--json"],
        "reshard": [""],
        "upcycle": ["", "--json"],
        "plot": ["--out", "--json"],
    }
    flags["glue"] = ["--dest-dir"]
    assert_sentences(malformed.outputs(commands, flags, tmp_path), folder, capsys)


def test_checkpoints(inputs, tmp_path, capsys):
    folder, commands, _, _ = inputs
    good = folder / "moe" / "checkpoint_last.pt"
    out = str(tmp_path / "new.pt")
    readers = {
        "inspect": commands["inspect"],
        "reshard": [str(good), out, "--portable"],
        "upcycle": [str(good), out, "--num-experts", "2"],
        "convert": [str(good), out],
    }
    assert torch.load(good, weights_only=True)
    assert_sentences(malformed.checkpoints(good, tmp_path, readers, count=100), folder, capsys)


def test_study_specs(inputs, tmp_path, capsys):
    folder, _, _, spec = inputs
    assert_sentences(malformed.specs(spec, tmp_path), folder, capsys)


def test_logs_and_load_files(inputs, tmp_path, capsys):
    assert_sentences(malformed.logs(TRAIN_LOG, LOAD_LOG, tmp_path), inputs[0], capsys)


def test_glue_tables(inputs, tmp_path, corpus, capsys):
    assert_sentences(malformed.tables(tmp_path, corpus / "dict.de.txt"), inputs[0], capsys)
