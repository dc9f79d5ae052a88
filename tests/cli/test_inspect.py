"""`fairseq-sparsemixer inspect`: what it shows of a checkpoint, and what it refuses."""

import json

import pytest

from fairseq_sparsemixer.cli import main


def test_shows_experts_parameters_flops_and_load_and_writes_them(trained, tmp_path, capsys):
    flags, checkpoint = trained
    assert main(["inspect", str(checkpoint), *flags[2:], "--json", str(tmp_path / "r.json")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "router sparsemixer, 1 of the experts for a token" in printed and "load of decoder.layers.0" in printed
    report = json.loads((tmp_path / "r.json").read_text())
    assert [layer["num_experts"] for layer in report["layers"]] == [4, 4]
    assert {name: sum(load) for name, load in report["load"].items()} == {"encoder.layers.0": 4, "decoder.layers.0": 4}


def test_the_file_alone_is_enough(trained, capsys):
    _, checkpoint = trained
    for dictionary in checkpoint.parent.glob("dict.*"):
        dictionary.unlink()
    assert main(["inspect", str(checkpoint)]) == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--text", "a.en"], "give both --text FILE and --target FILE"),
        (["--sentences", "0"], "--sentences 0 must be at least 1"),
        ([], "does not exist"),
    ],
)
def test_bad_flags_end_with_one_sentence(flags, message):
    with pytest.raises(SystemExit, match="fairseq-sparsemixer: ") as stopped:
        main(["inspect", "missing.pt", *flags])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
