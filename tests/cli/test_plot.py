"""`fairseq-sparsemixer plot`, and the reading of run logs."""

import json
import math
import os

import pytest

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.runs import read_run

LAYERS = ["encoder.layers.0", "decoder.layers.0"]


@pytest.fixture
def run_dir(tmp_path):
    """fairseq's logs of a run of 20 updates with 2 x 2 experts, with other text, repeated lines and a truncated last line."""
    lines = ["{'_name': None}", "TransformerMoEModel("]
    for updates, loss, speed in ((10, 3.0, 100), (10, 3.0, 100), (20, 2.5, 300)):
        lines.append(json.dumps({"epoch": 1, "loss": "9", "wps": str(speed), "wpb": "600", "num_updates": str(updates)}))
        lines.append("2026 | INFO | valid | " + json.dumps({"valid_loss": str(loss), "valid_num_updates": str(updates)}))
    folder = tmp_path / "a_run"
    folder.mkdir()
    (folder / "train.log").write_text("\n".join([*lines, '{"valid_loss": "1.0", "valid_nu']))
    loads = [(10, [[5, 5], [9, 1]]), (20, [[5, 5], [9, 1]]), (20, [[5, 5], [11, 9]])]
    lines = [json.dumps({"num_updates": updates, "layers": LAYERS, "load": load}) for updates, load in loads]
    (folder / "load.jsonl").write_text("\n".join(lines))
    return folder


def test_a_run_is_read_from_its_logs(run_dir):
    run = read_run(run_dir)
    assert (run.name, run.updates, run.words_per_second) == ("a_run", 20, 200)
    assert run.seconds_per_update == (6 + 2) / 2
    assert run.valid_loss == [(10, 3.0), (20, 2.5)]
    assert run.load.layers == LAYERS and len(run.load.counts) == 2
    assert run.load.total() == [[0.5, 0.5], [20 / 30, 10 / 30]]


def with_languages(folder, *lines):
    """Write load lines of 2 x 2 experts by language: (updates, {language: [L][E]})."""
    text = []
    for updates, load in lines:
        rows = [[load[name][layer] for name in load] for layer in range(2)]
        total = [[sum(column) for column in zip(*layer)] or [0, 0] for layer in rows]
        text.append({"num_updates": updates, "layers": LAYERS, "load": total, "languages": list(load), "language_load": rows})
    (folder / "load.jsonl").write_text("\n".join(map(json.dumps, text)))


def test_languages_are_summed_over_lines_by_name(run_dir):
    with_languages(
        run_dir,
        (10, {"fr": [[1, 2], [3, 4]]}),
        (20, {"de": [[9, 9], [9, 9]]}),  # replaced by the same update of a resumed run
        (20, {"de": [[5, 0], [0, 5]], "fr": [[1, 1], [1, 1]]}),
    )
    found = read_run(run_dir).load.languages
    assert (found.layers, found.languages) == (LAYERS, ["de", "fr"])
    assert found.counts == [[[5, 0], [2, 3]], [[0, 5], [4, 5]]]


def test_the_command_draws_languages(run_dir, tmp_path):
    with_languages(run_dir, (10, {"fr": [[1, 2], [3, 4]], "de": [[0, 1], [1, 0]]}))
    assert main(["plot", str(run_dir), "--out", str(tmp_path / "plots")]) == 0
    assert (tmp_path / "plots" / "language_load.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_number_of_languages_is_reported(run_dir):
    with_languages(run_dir, (10, {"fr": [[1, 2], [3, 4]]}))
    text = (run_dir / "load.jsonl").read_text()
    (run_dir / "load.jsonl").write_text(text.replace('["fr"]', '["fr", "de"]'))
    with pytest.raises(ConfigurationError, match="does not have 2 languages in each of the 2 layers"):
        read_run(run_dir)


def test_load_entropy_is_one_if_balanced_and_is_averaged_over_layers(run_dir):
    uneven = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
    assert read_run(run_dir).load.entropy() == pytest.approx((1 + uneven) / 2)


def test_the_command_writes_plots_and_figures(run_dir, tmp_path, capsys):
    (run_dir / "load.jsonl").rename(tmp_path / "load.jsonl")
    dense = tmp_path / "dense"
    run_dir.rename(dense)
    run_dir.mkdir()
    (tmp_path / "load.jsonl").rename(run_dir / "load.jsonl")
    (run_dir / "train.log").write_text((dense / "train.log").read_text())
    assert main(["plot", str(dense), str(run_dir), "--out", str(tmp_path / "plots"), "--json", str(tmp_path / "f.json")]) == 0
    for name in ("valid_loss.png", "expert_load.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "f.json").read_text())
    assert [row["run"] for row in figures] == ["dense", "a_run"]
    assert figures[0]["load_entropy"] is None and figures[1]["valid_loss"] == 2.5
    assert "a_run" in capsys.readouterr().out


def test_a_folder_without_a_log_is_refused_with_the_flags_that_write_it(tmp_path):
    with pytest.raises(ConfigurationError, match="has no train.log; train with --log-format json --log-file"):
        read_run(tmp_path)
    (tmp_path / "train.log").write_text("nothing of use\n")
    with pytest.raises(ConfigurationError, match="no figures"):
        read_run(tmp_path)


def log(run_dir, **changes):
    """The run's folder, with the given values in the second line of its log."""
    line = {"loss": "9", "wps": "100", "wpb": "600", "num_updates": "10", **changes}
    (run_dir / "train.log").write_text("a line of text\n" + json.dumps(line) + "\n")
    return run_dir


@pytest.mark.parametrize("name", ["loss", "wps", "wpb", "num_updates"])
@pytest.mark.parametrize("value", [None, "x", "", [], {}, True, [[]], 1e308, 10**400, "-1e300"])
def test_an_invalid_log_value_is_reported_with_file_line_and_name(run_dir, name, value):
    with pytest.raises(ConfigurationError, match=f"train.log:2: {name} .* is not a number.*; correct the line"):
        read_run(log(run_dir, **{name: value}))


@pytest.mark.parametrize("value", [-1, 1.5, "nan", "inf"])
def test_a_number_of_updates_must_be_a_nonnegative_integer(run_dir, value):
    with pytest.raises(ConfigurationError, match="num_updates .* is not a number of updates"):
        read_run(log(run_dir, num_updates=value))


@pytest.mark.parametrize("changes", [
    {"load": None}, {"load": []}, {"load": [[]]}, {"load": [["a"], ["b"]]}, {"load": [[1, 2], [3]]}, {"load": [[1, 2]]},
    {"load": [[1, 2, 3], [1, 2, 3]]}, {"load": [[-1, 2], [3, 4]]}, {"load": [[math.nan, 2], [3, 4]]},
    {"load": [[True, 2], [3, 4]]}, {"load": [[1e308, 2], [3, 4]]},
    {"layers": None}, {"layers": ["a"]}, {"layers": [1, 2]}, {"layers": "ab"},
    {"num_updates": None}, {"num_updates": "x"}, {"num_updates": -1}, {"num_updates": []},
])  # fmt: skip
def test_an_invalid_line_of_a_load_file_is_reported(run_dir, changes):
    lines = [{"num_updates": 10, "layers": LAYERS, "load": [[5, 5], [9, 1]]}]
    lines.append({"num_updates": 20, "layers": LAYERS, "load": [[5, 5], [9, 1]], **changes})
    (run_dir / "load.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigurationError, match="load.jsonl:2: (load|layers|num_updates) .*; correct the line"):
        read_run(run_dir)


def test_deeply_nested_and_broken_lines_are_skipped(run_dir):
    with (run_dir / "train.log").open("a") as file:
        file.write("\n" + '{"a": ' * 9999 + "\n{" + '"n": ' + "9" * 9999 + "}\n\x00\n")
    assert read_run(run_dir).updates == 20


def test_a_diverged_run_is_plotted_with_gaps_and_is_null_in_json(run_dir, tmp_path):
    lines = [json.dumps({"valid_loss": loss, "valid_num_updates": str(n)}) for n, loss in enumerate(("3", "nan", "inf"), 1)]
    (run_dir / "train.log").write_text("\n".join(lines) + "\n")
    assert main(["plot", str(run_dir), "--out", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 0
    assert json.loads((tmp_path / "f.json").read_text())[0]["valid_loss"] == 3.0
    (run_dir / "train.log").write_text(lines[1] + "\n")
    assert main(["plot", str(run_dir), "--out", str(tmp_path), "--json", str(tmp_path / "f.json")]) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads((tmp_path / "f.json").read_text(), parse_constant=refuse)[0]["valid_loss"] is None


def kept(folder, *flags):
    """Check that plot fails and changes no file; its error message."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises((ConfigurationError, SystemExit)) as error:
        main(["plot", *map(str, flags)])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return str(error.value)


def test_nothing_is_written_unless_all_inputs_and_outputs_are_valid(run_dir, tmp_path, capsys):
    out = tmp_path / "plots"
    out.mkdir()
    (out / "valid_loss.png").write_text("of an earlier run")
    assert "cannot be written" in kept(tmp_path, run_dir, "--out", out, "--json", tmp_path / "missing" / "f.json")
    assert "would overwrite" in kept(tmp_path, run_dir, "--out", out, "--json", run_dir / "train.log")
    assert "would overwrite" in kept(tmp_path, run_dir, "--out", out, "--json", out / "valid_loss.png")
    if os.path.exists("/dev/full"):
        assert "No space left" in kept(tmp_path, run_dir, "--out", out, "--json", "/dev/full")
    assert "cannot be written" in kept(tmp_path, run_dir, "--out", "/dev/null")
    assert "cannot be written" in kept(tmp_path, run_dir, "--out", run_dir / "train.log")
    assert "cannot be written" in kept(tmp_path, run_dir, "--out", tmp_path / ("x" * 300))
    kept(tmp_path, run_dir, "--out", "")
    assert "the name of the folder is empty" in capsys.readouterr().err
    (out / "expert_load.png").symlink_to("/dev/null")
    assert "expert_load.png, which is not a regular file" in kept(tmp_path, run_dir, "--out", out)
    (run_dir / "load.jsonl").write_text('{"num_updates": 1, "layers": [], "load": []}\n')
    assert "load.jsonl:1: layers" in kept(tmp_path, run_dir, "--out", out)


@pytest.mark.parametrize("name", ["$x_{", "a$b$\\frac", "_hidden", "[bold]", "%s{}"])
def test_a_runs_name_is_printed_verbatim(run_dir, tmp_path, capsys, name):
    run_dir.rename(tmp_path / name)
    assert main(["plot", str(tmp_path / name), "--out", str(tmp_path)]) == 0
    assert name in capsys.readouterr().out


def test_a_path_that_is_not_a_run_is_refused(tmp_path):
    os.mkfifo(tmp_path / "train.log")
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b", tmp_path / "missing"):
        with pytest.raises(ConfigurationError, match="has no train.log"):
            read_run(path)
