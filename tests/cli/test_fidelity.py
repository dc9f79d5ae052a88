"""`fairseq-sparsemixer fidelity`: its output and files, and the flags it refuses."""

import json

import pytest

from fairseq_sparsemixer.cli import main

SMALL = ["fidelity", "--tokens", "3", "--num-experts", "4", "--model-dim", "4"]


@pytest.fixture
def quick(monkeypatch):
    """Skip timing, which is not meaningful on a shared machine."""
    monkeypatch.setattr("fairseq_sparsemixer.tools.fidelity.study.relative_times", lambda methods, num_experts, seed: {})


def without_time(path):
    figures = json.loads(path.read_text())
    return {**figures, "estimators": [{**row, "time": None} for row in figures["estimators"]]}


@pytest.mark.slow
def test_the_command_prints_table_and_conclusions_and_writes_both_files(quick, tmp_path, capsys):
    assert main([*SMALL, "--draws", "300", "--json", str(tmp_path / "f.json"), "--png", str(tmp_path / "f.png")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "midpoint*" in printed and "300 draws" in printed and "- The choice term is" in printed
    figures = json.loads((tmp_path / "f.json").read_text())
    found = {row["estimator"] for row in figures["estimators"]}
    assert found >= {"switch", "euler", "midpoint", "midpoint*", "heun3", "inf", "reinforce", "dense_st"}
    assert figures["exact"]["autograd_difference"] < 1e-12 and figures["conclusions"]
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.png"]


def test_a_plot_that_fails_leaves_no_figures(quick, tmp_path, monkeypatch):
    def fail(study):
        raise MemoryError

    monkeypatch.setattr("fairseq_sparsemixer.tools.fidelity.plots.draw_study", fail)
    with pytest.raises(MemoryError):
        main([*SMALL, "--draws", "10", "--json", str(tmp_path / "f.json"), "--png", str(tmp_path / "f.png")])
    assert not list(tmp_path.iterdir())


def test_the_same_seed_gives_the_same_figures_except_times(tmp_path, capsys):
    for name in ("a.json", "b.json"):
        main([*SMALL, "--draws", "100", "--seed", "7", "--json", str(tmp_path / name)])
    assert without_time(tmp_path / "a.json") == without_time(tmp_path / "b.json")


def test_expectations_show_midpoint_exact_on_a_quadratic(quick, tmp_path, capsys):
    main([*SMALL, "--loss", "quadratic", "--expectation", "--json", str(tmp_path / "f.json"), "--png", str(tmp_path / "f.png")])
    rows = {row["estimator"]: row for row in json.loads((tmp_path / "f.json").read_text())["estimators"]}
    assert rows["midpoint*"]["bias_full"] < 1e-10 < 1e-2 < rows["euler"]["bias_full"]
    assert rows["midpoint*"]["unbiased"] and not rows["midpoint"]["unbiased"]


def test_the_effect_of_masking_is_reported(quick, capsys):
    main([*SMALL, "--jitter-eps", "0.1", "--expectation", "--estimators", "midpoint"])
    assert "Masking at jitter 0.1 leaves" in " ".join(capsys.readouterr().out.split())
    main([*SMALL, "--jitter-eps", "inf", "--expectation", "--estimators", "midpoint"])
    assert "Masking" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--estimators", "simpson"], "--estimators simpson is unknown; choose from switch-argmax, switch"),
        (["--num-experts", "1"], "--num-experts 1 must be at least 2"),
        (["--tokens", "0"], "--tokens 0 must be at least 1"),
        (["--draws", "1"], "--draws 1 must be at least 2"),
        *(
            ([f"--step={step}"], f"--step {float(step)} must be between 1e-06 and 1e+06")
            for step in ("nan", "inf", "-inf", "0", "-1", "1e300", "1e-300")
        ),
        (["--jitter-eps", "1e-9"], "gradient has norm 0, too small or too large to compare with; change --step or --jitter-eps"),
        (["--jitter-eps", "nan"], "--jitter-eps nan would mask all experts but one"),
        (["--seed", str(2**64)], f"--seed {2**64} must fit in 64 bits"),
        (["--model-dim", "0"], "--model-dim 0 must be at least 1"),
        (["--tokens", str(10**12)], "numbers at once; choose smaller values, for at most 536,870,912"),
        (["--jitter-eps", "0"], "--jitter-eps 0 would mask all experts but one"),
        (["--expectation", "--draws", "9"], "--expectation makes no draws; leave out --draws 9"),
        (["--text", "a.en"], "--text a.en needs --checkpoint FILE"),
        (["--checkpoint", "m.pt"], "--checkpoint needs sentences to run on: give --text FILE and --target FILE"),
        (["--checkpoint", "m.pt", "--loss", "cubic"], "--loss describes a synthetic problem; leave it out"),
        (["--checkpoint", "m.pt", "--text", "no.en", "--target", "no.de"], "--text no.en cannot be read"),
    ],
)
def test_bad_flags_give_a_one_line_error(flags, message):
    with pytest.raises(SystemExit, match="fairseq-sparsemixer: ") as stopped:
        main(["fidelity", *flags])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)


@pytest.mark.slow
def test_a_layer_of_a_checkpoint_is_measured_on_text(quick, trained, tmp_path, capsys):
    flags, _ = trained
    main(
        [
            "fidelity",
            *flags,
            "--layer",
            "decoder.layers.0",
            "--estimators",
            "midpoint,reinforce",
            "--json",
            str(tmp_path / "f.json"),
        ]
    )
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["problem"] == "decoder.layers.0 of m.pt (router sparsemixer, 4 experts), 4 tokens of 1 sentence"
    assert figures["jitter_eps"] == 0.1 and figures["draws"] is None
    assert figures["exact"]["autograd_difference"] < 1e-10


def test_missing_dictionaries_are_reported_with_the_remedy(quick, trained, tmp_path):
    flags, _ = trained
    with pytest.raises(SystemExit, match="needs the dictionaries it was trained with .*; give their folder with --data-bin"):
        main(["fidelity", *flags, "--data-bin", str(tmp_path / "elsewhere")])


@pytest.mark.parametrize("content, message", [(None, "does not exist"), (b"no checkpoint", "is not a checkpoint")])
def test_an_unreadable_checkpoint_gives_a_one_line_error(trained, content, message):
    flags, checkpoint = trained
    checkpoint.unlink()
    if content is not None:
        checkpoint.write_bytes(content)
    with pytest.raises(SystemExit, match=f"m.pt {message}"):
        main(["fidelity", *flags])


def test_an_unwritable_file_gives_a_one_line_error(quick, tmp_path):
    with pytest.raises(SystemExit, match="--json .* cannot be written"):
        main([*SMALL, "--expectation", "--json", str(tmp_path / "missing" / "f.json")])
