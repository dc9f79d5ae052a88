"""`fairseq-sparsemixer inspect`: its report on a checkpoint, and the inputs it refuses."""

import json
import os
from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError


def test_the_report_has_experts_parameters_flops_and_load(trained, tmp_path, capsys):
    flags, checkpoint = trained
    assert main(["inspect", str(checkpoint), *flags[2:], "--json", str(tmp_path / "r.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "router sparsemixer, k = 1" in printed and "load of decoder.layers.0" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    assert [layer["num_experts"] for layer in report["layers"]] == [4, 4]
    assert {name: sum(load) for name, load in report["load"].items()} == {"encoder.layers.0": 4, "decoder.layers.0": 4}


def test_only_the_checkpoint_file_is_needed(trained, capsys):
    _, checkpoint = trained
    for dictionary in checkpoint.parent.glob("dict.*"):
        dictionary.unlink()
    assert main(["inspect", str(checkpoint)]) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--target", "a.de"], "--target a.de needs its source sentences; give --text FILE"),
        (["--text", "t", "--sentences", "0"], "--sentences 0 must be at least 1"),
        ([], "does not exist"),
    ],
)
def test_bad_flags_give_a_one_line_error(flags, message):
    with pytest.raises(SystemExit, match="fairseq-sparsemixer: ") as stopped:
        main(["inspect", "missing.pt", *flags])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


def test_a_missing_target_text_is_named(trained):
    flags, checkpoint = trained
    with pytest.raises(ConfigurationError, match="m.pt is a translation model; give --target FILE"):
        main(["inspect", str(checkpoint), *flags[2:4]])


@pytest.mark.parametrize("command", ["inspect", "fidelity"])
def test_a_checkpoint_without_a_criterion_cannot_run_on_sentences(trained, command):
    flags, checkpoint = trained
    state = torch.load(checkpoint, weights_only=False)
    del state["args"].criterion
    torch.save(state, checkpoint)
    with pytest.raises(ConfigurationError, match="m.pt names no criterion in its settings; give a checkpoint that fairseq-train"):
        main([command, *([str(checkpoint), *flags[2:]] if command == "inspect" else flags)])


@pytest.mark.slow
@pytest.mark.parametrize("task, criterion, arch, mark", [
    ("language_modeling", "moe_cross_entropy", "transformer_lm_moe_tiny", 0),
    ("masked_lm", "moe_masked_lm", "roberta_moe_tiny", 1),
    ("masked_lm", "electra", "electra_moe_tiny", 1),
])  # fmt: skip
def test_the_load_of_a_monolingual_model_counts_words_and_sentence_marks(
    task, criterion, arch, mark, run_fairseq, dictionary, tmp_path, capsys
):
    text = tmp_path / "train"
    text.write_text("w1 w2 w3 w4\nw5 w6\n", encoding="utf-8")
    dictionary.save(str(tmp_path / "words"))
    prefixes = ["--trainpref", text, "--validpref", text, "--srcdict", tmp_path / "words"]
    run_fairseq("preprocess", "--only-source", *prefixes, "--destdir", tmp_path / "bin")
    run_fairseq(
        "train", tmp_path / "bin", "--task", task, "--criterion", criterion, "--arch", arch, "--num-experts", 4,
        "--tokens-per-sample", 16, "--batch-size", 1, "--required-batch-size-multiple", 1, "--max-update", 1,
        "--optimizer", "adam", "--save-dir", tmp_path, *(["--mask-prob", 0.5] if mark else []),
    )  # fmt: skip
    checkpoint = str(tmp_path / "checkpoint_last.pt")
    capsys.readouterr()
    assert main(["inspect", checkpoint, "--text", str(text), "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["load"]) == [layer["name"] for layer in report["layers"]]
    assert {sum(load) for load in report["load"].values()} == {6 + 2 * (1 + mark)}
    printed = "".join(capsys.readouterr().out.split())
    assert all(layer["name"] in printed for layer in report["layers"])
    with pytest.raises(ConfigurationError, match="is for translation models"):
        main(["inspect", checkpoint, "--text", str(text), "--target", str(text)])
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigurationError, match="empty has no sentences; give another file"):
        main(["inspect", checkpoint, "--text", str(tmp_path / "empty")])


ODD = {
    "experts of one dimension": {"encoder.layers.0.fc1.moe.experts.weight_in": torch.ones(3)},
    "experts without all their tensors": {"encoder.layers.0.fc1.moe.experts.weight_in": torch.ones(2, 3, 4)},
    "experts without a dimension": {"encoder.layers.0.fc1.moe.experts.bias_in": torch.tensor(1.0)},
    "experts that differ in number": {
        "encoder.layers.0.fc1.moe.experts.weight_in": torch.ones(2, 3, 4),
        "encoder.layers.0.fc1.moe.experts.weight_out": torch.ones(3, 4, 3),
    },
}


@pytest.mark.parametrize("kind", ODD)
def test_invalid_tensors_give_a_one_line_error(kind, trained):
    _, checkpoint = trained
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "model": ODD[kind]}, checkpoint)
    with pytest.raises(ConfigurationError, match="m.pt is .*; use another file") as error:
        main(["inspect", str(checkpoint)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("settings", [{"args": 5}, {"args": None, "cfg": [1]}, {"args": Namespace(router=3)}, {"args": None}])
def test_invalid_settings_give_at_most_a_one_line_error(settings, trained):
    _, checkpoint = trained
    torch.save({**torch.load(checkpoint, weights_only=True), **settings}, checkpoint)
    try:
        main(["inspect", str(checkpoint)])
    except ConfigurationError as error:
        assert "\n" not in str(error)


def test_a_pipe_and_a_folder_are_refused_without_blocking(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    for path, kind in ((tmp_path / "pipe.pt", "a pipe or device"), (tmp_path, "a folder"), ("/dev/zero", "a pipe or device")):
        with pytest.raises(ConfigurationError, match=f"{path} is {kind}; name a checkpoint file"):
            main(["inspect", str(path)])


def test_the_json_report_must_not_overwrite_the_checkpoint(trained):
    _, checkpoint = trained
    before = checkpoint.read_bytes()
    with pytest.raises(ConfigurationError, match="--json .*m.pt would overwrite a file of this command; give another path"):
        main(["inspect", str(checkpoint), "--json", str(checkpoint)])
    assert checkpoint.read_bytes() == before
