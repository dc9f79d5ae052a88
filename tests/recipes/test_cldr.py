"""The corpus made from CLDR."""

import runpy
import sys

import pytest

import recipes.common.cldr
from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.cldr import NAMES, make_cldr

SIZES = {"train": 20_000, "valid": 500, "test": 500}


@pytest.fixture(scope="module")
def corpus():
    return make_cldr(SIZES, seed=1)


def test_the_sizes_are_those_asked_for(corpus):
    assert {split: len(pairs) for split, pairs in corpus.items()} == SIZES


@pytest.mark.parametrize("side", ["source", "target"])
def test_no_sentence_of_either_side_occurs_twice_in_any_split(corpus, side):
    sentences = [getattr(pair, side) for pairs in corpus.values() for pair in pairs]
    assert len(set(sentences)) == len(sentences) == sum(SIZES.values())


def test_a_seed_makes_the_same_corpus_again_and_another_seed_another():
    sizes = {"train": 1500, "test": 50}
    assert make_cldr(sizes, seed=3) == make_cldr(sizes, seed=3)
    assert make_cldr(sizes, seed=3)["test"] != make_cldr(sizes, seed=4)["test"]


def test_sentences_are_single_lines_without_special_spaces(corpus):
    text = "".join(sentence for pairs in corpus.values() for pair in pairs for sentence in pair)
    assert not set(text) & set("\n\r\t\u00a0\u202f\u2009")


def test_the_two_sides_say_the_same_by_the_rules_of_their_languages(corpus):
    pairs = [pair for split in corpus.values() for pair in split]
    assert any("March" in source and "März" in target for source, target in pairs)
    assert all(("AM" in source or "PM" in source) for source, target in pairs if " Uhr" in target)
    assert not any("AM" in target.split() for _, target in pairs)


def test_bare_names_are_for_training_only(corpus):
    from babel import Locale

    names = {getattr(Locale("en"), table)[code] for table, codes in NAMES.items() for code in codes}
    for split in ("valid", "test"):
        assert not names & {pair.source for pair in corpus[split]}


def test_without_babel_the_requirements_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "babel", None)
    with pytest.raises(ConfigurationError, match="Babel; pip install -r recipes/requirements.txt"):
        runpy.run_path(recipes.common.cldr.__file__)
