"""The corpus generated from CLDR."""

import re
import runpy
import sys
from collections import Counter

import pytest

import recipes.common.cldr
from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.cldr import GERMAN, MANY, make_cldr, shared_names

SIZES = {"train": 20_000, "valid": 500, "test": 500}


@pytest.fixture(scope="module")
def corpus():
    return make_cldr(SIZES, seed=1)


def test_the_splits_have_the_requested_sizes(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == SIZES


@pytest.mark.parametrize("side", ["source", "target"])
def test_no_sentence_occurs_twice_on_either_side(corpus, side):
    sentences = [getattr(pair, side) for pairs in corpus.values() for pair in pairs]
    assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_the_corpus_depends_only_on_the_seed():
    sizes = {"train": 1500, "test": 50}
    assert make_cldr(sizes, seed=3) == make_cldr(sizes, seed=3)
    assert make_cldr(sizes, seed=3)["test"] != make_cldr(sizes, seed=4)["test"]


def test_sentences_are_single_lines_without_special_spaces(corpus):
    text = "".join(sentence for pairs in corpus.values() for pair in pairs for sentence in pair)
    assert not set(text) & set("\n\r\t\u00a0\u202f\u2009")


def test_both_sides_follow_the_formats_of_their_languages(corpus):
    pairs = [pair for split in corpus.values() for pair in split]
    assert any("March" in source and "März" in target for source, target in pairs)
    assert all(("AM" in source or "PM" in source) for source, target in pairs if " Uhr" in target)
    assert not any("AM" in target.split() for _, target in pairs)


def test_single_names_occur_only_in_training(corpus):
    from babel import Locale

    names = {getattr(Locale("en"), table)[code] for table, codes in shared_names(GERMAN).items() for code in codes}
    for split in ("valid", "test"):
        assert not names & {pair.source for pair in corpus[split]}


@pytest.fixture(scope="module")
def many():
    return make_cldr({"train": 24_000, "valid": 320, "test": 800}, seed=1, targets=MANY)


def split_tag(pair):
    """(language, English sentence)."""
    return re.fullmatch(r"<2(\w\w)> (.+)", pair.source).groups()


def test_every_split_is_balanced_over_many_languages(many):
    for split, pairs in many.items():
        counts = Counter(split_tag(pair)[0] for pair in pairs)
        assert set(counts) == set(MANY)
        # a name shared by two codes occurs once, so sizes differ slightly by language
        assert max(counts.values()) - min(counts.values()) <= (10 if split == "train" else 0)


def test_with_many_languages_no_sentence_or_translation_occurs_in_two_splits(many):
    english = {split: {split_tag(pair)[1] for pair in pairs} for split, pairs in many.items()}
    translations = {split: {(split_tag(pair)[0], pair.target) for pair in pairs} for split, pairs in many.items()}
    for sides in (english, translations):
        assert not sides["train"] & sides["test"] and not sides["train"] & sides["valid"] and not sides["valid"] & sides["test"]
    assert len(translations["test"]) == 800


def test_each_language_uses_its_own_month_names(many):
    from babel import Locale

    for pairs in many.values():
        for pair in pairs:
            language, sentence = split_tag(pair)
            month = re.search(r"\b(January|February|August|October) \d", sentence)
            if month:
                number = ["January", "February", "August", "October"].index(month.group(1))
                names = Locale(language).months["format"]["wide"]
                assert names[(1, 2, 8, 10)[number]] in pair.target


def test_many_languages_are_reproducible_by_seed():
    sizes = {"train": 16_000, "test": 32}
    assert make_cldr(sizes, seed=3, targets=("fr", "tr")) == make_cldr(sizes, seed=3, targets=("fr", "tr"))


def test_without_babel_the_error_names_the_requirements(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(ConfigurationError, match="Babel; pip install -r recipes/requirements.txt"):
        runpy.run_path(recipes.common.cldr.__file__)
