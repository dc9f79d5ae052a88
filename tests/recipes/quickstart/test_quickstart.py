"""The whole quickstart, small."""

import json

import pytest
from fairseq import checkpoint_utils

from fairseq_sparsemixer import cli
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.scores import read_hypotheses
from recipes.quickstart.__main__ import main, parse_options, text_of, write_study

RUN = "runs/sparsemixer-e8-seed1"
SMALL = ["--targets", "de", "fr", "tr", "--pairs", "3000", "--updates", "40", "--routers", "sparsemixer"]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("quickstart")
    main(["--out", str(out), *SMALL])
    return out


@pytest.mark.slow
def test_it_ends_with_figures_and_plots(quickstart):
    content = json.loads((quickstart / "results" / "results.json").read_text())
    (result,) = content["results"]
    assert result["router"] == "sparsemixer" and result["updates"] == 40
    assert 0 < result["active_parameters"] < result["parameters"]
    assert 0 < result["load_entropy"] <= 1 and result["words_per_second"] > 0 and result["valid_loss"] > 0
    assert "version:" in result["signature"]
    text = (quickstart / "results" / "results.md").read_text()
    assert "| sparsemixer |" in text and "### chrF by language" in text and "| tr " in text
    assert 0 <= result["language_bits"] <= 3  # of 8 experts
    for name in ("valid_loss.png", "expert_load.png", "language_load.png"):
        assert (quickstart / "results" / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_test_sentence_is_translated(quickstart):
    lines = read_hypotheses(quickstart / RUN / "test.txt")
    assert len(lines) == len((quickstart / "data" / "raw" / "test.xx").read_text(encoding="utf-8").splitlines()) == 75


@pytest.mark.slow
def test_a_second_run_does_nothing_again_and_reads_each_model_once(quickstart, capsys, monkeypatch):
    checkpoint = quickstart / RUN / "checkpoints" / "checkpoint_last.pt"
    before, read, paths = checkpoint.stat().st_mtime_ns, checkpoint_utils.load_checkpoint_to_cpu, []
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint_to_cpu", lambda *a, **k: paths.append(a[0]) or read(*a, **k))
    main(["--out", str(quickstart), *SMALL])
    assert len(paths) == 1
    assert checkpoint.stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("done before") == 2  # the data, and the run with its translation


@pytest.mark.slow
def test_it_is_a_study_that_can_be_reported_as_one(quickstart, capsys):
    assert cli.main(["study", str(quickstart / "study.yaml"), "--out", str(quickstart), "--report-only"]) == 0
    assert "Unicode CLDR, English into 3 languages" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ("--updates 0", "--updates 0 must be at least 1"),
    ("--pairs 30", "--pairs 30 must be at least 16,000"),
    ("--targets de --pairs 30", "--pairs 30 must be at least 1,000"),
    ("--routers dense swich", "--router swich is unknown; choose from dense, .*switch"),
])  # fmt: skip
def test_what_makes_no_experiment_is_refused_before_anything_is_done(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_options(flags.split())


@pytest.fixture
def study_of(tmp_path):
    """study_of(flags) -> the study that the flags ask for."""
    (tmp_path / "data" / "bin").mkdir(parents=True)
    (tmp_path / "data" / "raw").mkdir()
    for language in ("en", "xx", "de"):
        (tmp_path / "data" / "raw" / f"test.{language}").write_text("<2de> gut\n", encoding="utf-8")

    def make(flags):
        options = parse_options(flags.split())
        return write_study(options, text_of(options), tmp_path / "study.yaml")

    return make


@pytest.mark.parametrize("flags", [["--targets", "de"], ["--pairs", "24000"]])
def test_flags_of_the_cldr_corpus_are_refused_for_multi30k(flags):
    with pytest.raises(ConfigurationError, match="is for the CLDR corpus, and --raw-dir gives Multi30k; leave it out"):
        parse_options(["--raw-dir", "raw", *flags])


def test_the_study_has_the_routers_budget_and_seed_that_were_asked_for(study_of, tmp_path):
    study = study_of("--routers dense sparsemixer_v2 --updates 7 --seed 3 --raw-dir raw")
    assert [run.name for run in study.runs()] == ["dense-seed3", "sparsemixer_v2-e4-seed3"]
    assert (study.flags["max-update"], study.flags["dropout"], study.title) == (7, 0.1, "Multi30k, English-German")
    assert study.data == (tmp_path / "data" / "bin").resolve() and study.baseline == "dense"


def test_sixteen_languages_are_the_default_and_one_is_an_option(study_of):
    many, one = study_of(""), study_of("--targets de")
    assert many.title == "Unicode CLDR, English into 16 languages" and one.title == "Unicode CLDR, English-German"
    assert (many.flags["target-lang"], one.flags["target-lang"]) == ("xx", "de")
    assert (many.num_experts, one.num_experts) == ([8], [4])
    assert [run.router for run in many.runs()] == [run.router for run in one.runs()] == ["dense", "switch", "sparsemixer"]


def test_many_languages_have_their_tags_as_single_pieces_and_one_has_none():
    assert text_of(parse_options(["--targets", "de", "tr"])).pieces == {"user_defined_symbols": ["<2de>", "<2tr>"]}
    assert text_of(parse_options(["--targets", "de"])).pieces == {}
