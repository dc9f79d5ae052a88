"""BLEU and chrF of translations: paired-bootstrap intervals, and scores per language."""

import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest
from study_runs import runs

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study import translation
from fairseq_sparsemixer.tools.study.grid import Test as Scoring  # a name that pytest does not collect
from fairseq_sparsemixer.tools.study.scores import read_languages
from fairseq_sparsemixer.tools.study.translation import translation_section, translations

METRICS = {"BLEU": BLEU, "chrF": CHRF}
WORDS = "der ein Hund Park Kind Ball Strand läuft spielt rot grün groß klein am im und mit auf".split()


def sentences(count, seed=1):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 12))) for _ in range(count)]


def spoiled(texts, share, seed):
    """Translations: the references with some words replaced."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) if draw.random() < share else word for word in text.split()) for text in texts]


@pytest.fixture
def scored(tmp_path):
    """scored(references, {router: translations per seed}, **test) -> the result of `translations` with baseline switch."""

    def score(references, systems, **test):
        (tmp_path / "reference").write_text("".join(f"{text}\n" for text in references), encoding="utf-8")
        members = []
        for router, seeds in systems.items():
            own = runs(router, [4.0] * len(seeds), 4)
            for run, texts in zip(own, seeds):
                folder = tmp_path / "runs" / run["run"]
                folder.mkdir(parents=True)
                lines = [f"D-{number}\t-0.5\t{text}\n" for number, text in enumerate(texts)]
                (folder / "test.txt").write_text("".join(lines), encoding="utf-8")
            members += own
        return translations(Scoring("bleu", tmp_path / "reference", **test), tmp_path, members, "switch")

    return score


def test_scores_and_signatures_equal_sacrebleus(scored):
    references = sentences(40)
    systems = {"switch": [spoiled(references, 0.4, 1)], "ours": [spoiled(references, 0.2, seed) for seed in (2, 3)]}
    found = scored(references, systems)
    for name, kind in METRICS.items():
        expected = [kind().corpus_score(texts, [references]).score for texts in systems["ours"]]
        assert found["models"]["ours-e4"][name]["mean"] == pytest.approx(np.mean(expected))
        assert found["models"]["ours-e4"][name]["deviation"] == pytest.approx(np.std(expected, ddof=1))
        metric = kind()
        metric.corpus_score(references, [references])
        assert found["signatures"][name] == str(metric.get_signature())


def test_the_interval_equals_that_of_resampled_sentences(scored, monkeypatch):
    """Compared with sacreBLEU on explicitly resampled sentences."""
    monkeypatch.setattr(translation, "RESAMPLES", 40)
    references = sentences(20)
    switch, ours = spoiled(references, 0.5, 1), spoiled(references, 0.4, 2)
    found = scored(references, {"switch": [switch], "ours": [ours]})["models"]["ours-e4"]
    rng = np.random.default_rng(translation.SEED)
    picks = [rng.integers(20, size=20) for _ in range(40)]
    for name, kind in METRICS.items():

        def corpus(texts, pick):
            return kind().corpus_score([texts[index] for index in pick], [[references[index] for index in pick]]).score

        low, high = np.percentile([corpus(ours, pick) - corpus(switch, pick) for pick in picks], [2.5, 97.5])
        difference = corpus(ours, range(20)) - corpus(switch, range(20))
        assert found[name]["difference"] == pytest.approx({"mean": difference, "low": low, "high": high})


def test_the_interval_over_seeds_is_students_t_of_the_differences(scored):
    references = sentences(40)
    systems = {
        name: [spoiled(references, share, seed) for seed in seeds]
        for name, share, seeds in [("switch", 0.5, (1, 2, 3)), ("ours", 0.4, (4, 5, 6)), ("single", 0.4, (7,))]
    }
    models = scored(references, systems)["models"]
    scores = {name: [CHRF().corpus_score(texts, [references]).score for texts in own] for name, own in systems.items()}
    differences = np.subtract(scores["ours"], scores["switch"])
    half = 4.30265273 * differences.std(ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    mean = differences.mean()
    assert models["ours-e4"]["chrF"]["over_seeds"] == pytest.approx({"mean": mean, "low": mean - half, "high": mean + half})
    assert models["single-e4"]["chrF"]["over_seeds"]["low"] is None  # one seed says nothing about others
    shown = translation_section({"translations": {"signatures": {}, "models": models, "languages": {}}})
    row = next(line for line in shown[1].splitlines() if line.startswith("| ours-e4"))
    assert f"[{mean - half:.2f}, {mean + half:.2f}]" in row


@pytest.mark.parametrize("share", [0.49, 0.46, 0.42])
def test_p_matches_sacrebleus_paired_bootstrap(scored, share):
    references = sentences(200)
    switch, ours = spoiled(references, 0.5, 1), spoiled(references, share, 2)
    found = scored(references, {"switch": [switch], "ours": [ours]})["models"]["ours-e4"]
    systems = [("switch", switch), ("ours", ours)]
    result = PairedTest(systems, {name: kind() for name, kind in METRICS.items()}, [references], "bs", 1000)()[1]
    for name, theirs in zip(METRICS, list(result.values())[1:]):  # after the systems' names
        assert found[name]["p"] == pytest.approx(theirs[1].p_value, abs=0.04)


def test_identical_translations_have_zero_difference(scored):
    references = sentences(30)
    texts = spoiled(references, 0.3, 1)
    figures = scored(references, {"switch": [texts], "ours": [texts]})["models"]
    assert figures["ours-e4"]["BLEU"]["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert figures["ours-e4"]["BLEU"]["p"] == 1
    assert "difference" not in figures["switch-e4"]["BLEU"]


def test_more_seeds_do_not_count_as_more_test_sentences(scored):
    """Two seeds with equal translations give the result of one, because a sentence is drawn with those of all seeds."""
    references = sentences(50)
    switch, ours = spoiled(references, 0.5, 1), spoiled(references, 0.4, 2)
    models = scored(references, {"switch": [switch] * 2, "ours": [ours] * 2, "single": [ours]})["models"]
    assert models["ours-e4"]["chrF"]["difference"] == pytest.approx(models["single-e4"]["chrF"]["difference"])


def test_runs_without_translations_are_left_out(scored, tmp_path):
    references = sentences(10)
    systems = {"switch": [references], "ours": [references]}
    scored(references, systems)
    (tmp_path / "runs" / "switch-e4-seed1" / "test.txt").unlink()
    members = runs("switch", [4.0], 4) + runs("ours", [4.0], 4)
    models = translations(Scoring("bleu", tmp_path / "reference"), tmp_path, members, "switch")["models"]
    assert list(models) == ["ours-e4"] and "difference" not in models["ours-e4"]["BLEU"]


@pytest.mark.parametrize("tagged", [True, False])
def test_every_language_is_scored_separately(scored, tmp_path, tagged):
    references, languages = sentences(30), ["de", "fr", "zh-Hans"] * 10
    (tmp_path / "languages").write_text("".join(f"<2{language}> a b\n" if tagged else f"{language}\n" for language in languages))
    seeds = [spoiled(references, 0.3, 1), spoiled(references, 0.3, 2)]
    found = scored(references, {"switch": seeds}, languages=tmp_path / "languages")
    assert list(found["languages"]) == ["de", "fr", "zh-Hans"] and found["languages"]["fr"]["sentences"] == 10
    for name, kind in METRICS.items():
        for start, language in enumerate(("de", "fr", "zh-Hans")):
            expected = np.mean([kind().corpus_score(texts[start::3], [references[start::3]]).score for texts in seeds])
            assert found["languages"][language][name]["switch-e4"] == pytest.approx(expected)


def test_a_languages_difference_is_bootstrapped_over_its_own_sentences_and_the_common_seeds(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(translation, "RESAMPLES", 40)
    references, languages = sentences(30), ["de", "fr", "pl"] * 10
    (tmp_path / "languages").write_text("\n".join(languages) + "\n")
    switch, ours = ([spoiled(references, share, seed) for seed in seeds] for share, seeds in ((0.5, (1, 2)), (0.4, (3, 4, 5))))
    found = scored(references, {"switch": switch, "ours": ours}, languages=tmp_path / "languages")["languages"]
    rng = np.random.default_rng(translation.SEED)
    picks = [np.arange(10), *(rng.integers(10, size=10) for _ in range(40))]
    for name, kind in METRICS.items():
        for start, language in enumerate(("de", "fr", "pl")):
            truth = references[start::3]
            by_pick = [
                [kind().corpus_score([texts[start::3][i] for i in pick], [[truth[i] for i in pick]]).score for pick in picks]
                for texts in (*ours[:2], *switch)
            ]
            differences = np.mean(by_pick[:2], axis=0) - np.mean(by_pick[2:], axis=0)
            low, high = np.percentile(differences[1:], [2.5, 97.5])
            expected = {"mean": differences[0], "low": low, "high": high}
            assert found[language]["difference"][name] == {"ours-e4": pytest.approx(expected)}


def test_results_of_earlier_versions_have_no_differences_by_language(scored, tmp_path):
    references = sentences(10)
    (tmp_path / "languages").write_text("de\n" * 10)
    found = scored(references, {"switch": [references], "ours": [references]}, languages=tmp_path / "languages")
    assert sum("Difference in" in part for part in translation_section({"translations": found})) == 2
    del found["languages"]["de"]["difference"]
    assert not any("Difference in" in part for part in translation_section({"translations": found}))


@pytest.mark.parametrize("line", ["", "a house", "2de a house", "<2de>a house", "<de> a house"])
def test_a_line_without_a_language_is_named(tmp_path, line):
    (tmp_path / "test.en").write_text(f"<2de> a\n{line}\n")
    with pytest.raises(ConfigurationError, match="test.en, line 2 does not begin with a tag such as <2de>"):
        read_languages(Scoring("bleu", languages=tmp_path / "test.en"))


def test_the_report_has_differences_signatures_and_a_table_of_languages(scored, tmp_path):
    references = sentences(20)
    (tmp_path / "languages").write_text("de\nfr\n" * 10)
    found = scored(references, {"switch": [spoiled(references, 0.5, 1)], "ours": [references]}, languages=tmp_path / "languages")
    shown = "\n".join(translation_section({"translations": found}))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("| ")]
    assert rows[0] == ["model", "BLEU", "difference", "over seeds", "chrF", "difference", "over seeds"] and rows[1][2] == "–"
    difference = found["models"]["ours-e4"]["BLEU"]["difference"]
    assert rows[2][2] == f"{difference['mean']:.2f} [{difference['low']:.2f}, {difference['high']:.2f}]"
    assert ["language", "sentences", "switch-e4", "ours-e4"] in rows and ["de", "10"] in [row[:2] for row in rows]
    assert "BLEU nrefs:1|case:mixed|eff:no|tok:13a" in shown and "chrF nrefs:1|case:mixed|eff:yes|nc:6|nw:0" in shown
