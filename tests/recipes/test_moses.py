"""Moses tokenisation."""

import pytest

pytest.importorskip("sacremoses")

from recipes.common.corpus import Pair
from recipes.common.moses import Tokeniser, detokeniser, tokenise_pairs


def test_dashes_are_split_punctuation_normalised_and_control_characters_removed():
    tokenise = Tokeniser("en", normalise=True, split_dashes=True)
    assert tokenise("A well-known “test”, isn’t it?\x07") == "A well @-@ known &quot; test , &quot; isn &apos;t it ?"
    assert Tokeniser("en", lowercase=True)("A Test-Case.") == "a test-case ."


def test_detokenising_restores_the_sentence():
    sentence = 'Das ist ein "gut-bekannter" Test & noch mehr.'
    assert detokeniser("de")(Tokeniser("de", split_dashes=True)(sentence)) == sentence


def test_several_processes_keep_the_order_of_pairs():
    pairs = [Pair(f"number {n}!", f"Nummer {n}!") for n in range(2500)]
    tokenisers = Tokeniser("en"), Tokeniser("de")
    tokens = list(tokenise_pairs(pairs, *tokenisers, workers=2))
    assert tokens == [Pair(f"number {n} !", f"Nummer {n} !") for n in range(2500)]
