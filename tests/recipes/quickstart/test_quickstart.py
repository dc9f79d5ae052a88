"""The whole quickstart, small."""

import json

import pytest

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.scores import read_hypotheses
from recipes.quickstart.__main__ import main, parse_options, text_of, write_study

RUN = "runs/sparsemixer-e4-seed1"


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("quickstart")
    main(["--out", str(out), "--pairs", "1200", "--updates", "40", "--routers", "sparsemixer"])
    return out


@pytest.mark.slow
def test_it_ends_with_figures_and_plots(quickstart):
    content = json.loads((quickstart / "results" / "results.json").read_text())
    (result,) = content["results"]
    assert result["router"] == "sparsemixer" and result["updates"] == 40
    assert 0 < result["active_parameters"] < result["parameters"]
    assert 0 < result["load_entropy"] <= 1 and result["words_per_second"] > 0 and result["valid_loss"] > 0
    assert "version:" in result["signature"]
    assert "| sparsemixer |" in (quickstart / "results" / "results.md").read_text()
    for name in ("valid_loss.png", "expert_load.png"):
        assert (quickstart / "results" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_test_sentence_is_translated(quickstart):
    lines = read_hypotheses(quickstart / RUN / "test.txt")
    assert len(lines) == len((quickstart / "data" / "raw" / "test.de").read_text(encoding="utf-8").splitlines()) == 30


@pytest.mark.slow
def test_a_second_run_does_nothing_again(quickstart, capsys):
    checkpoint = quickstart / RUN / "checkpoints" / "checkpoint_last.pt"
    before = checkpoint.stat().st_mtime_ns
    main(["--out", str(quickstart), "--pairs", "1200", "--updates", "40", "--routers", "sparsemixer"])
    assert checkpoint.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("done before") == 2  # the data, and the run with its translation


@pytest.mark.slow
def test_it_is_a_study_that_can_be_reported_as_one(quickstart, capsys):
    assert cli.main(["study", str(quickstart / "study.yaml"), "--out", str(quickstart), "--report-only"]) == 0
    assert "Unicode CLDR, English-German" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("--updates 0", "--updates 0 must be at least 1"),
    ("--pairs 30", "--pairs 30 must be at least 1,000"),
    ("--routers dense swich", "--router swich is unknown; choose from dense, .*switch"),
])  # fmt: skip
def test_what_makes_no_experiment_is_refused_before_anything_is_done(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_options(flags.split())


def test_the_study_has_the_routers_budget_and_seed_that_were_asked_for(tmp_path):
    (tmp_path / "data" / "bin").mkdir(parents=True)
    (tmp_path / "data" / "raw").mkdir()
    (tmp_path / "data" / "raw" / "test.de").write_text("gut\n", encoding="utf-8")
    options = parse_options("--routers dense sparsemixer_v2 --updates 7 --seed 3 --raw-dir raw".split())
    study = write_study(options, text_of(options), tmp_path / "study.yaml")
    assert [run.name for run in study.runs()] == ["dense-seed3", "sparsemixer_v2-e4-seed3"]
    assert (study.flags["max-update"], study.flags["dropout"], study.title) == (7, 0.1, "Multi30k, English-German")
    assert study.data == (tmp_path / "data" / "bin").resolve() and study.baseline == "dense"
    options = parse_options([])
    assert write_study(options, text_of(options), tmp_path / "study.yaml").flags["max-update"] == 400
