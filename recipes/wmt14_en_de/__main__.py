"""WMT'14 English-German, the translation experiment of the SparseMixer paper (arXiv 2310.00811).

Transformer-base with experts in every second layer, --num-experts 2, 4, 6, 8 or 16, --router switch or sparsemixer; beam 4,
length penalty 0.6, average of the last checkpoints; tokenised BLEU and sacreBLEU on newstest2014.
"""

from itertools import chain
from pathlib import Path
from typing import Callable, Iterable, List, Tuple

from rich.console import Console

from recipes.common import moses_translation, smoke
from recipes.common.corpus import LANGUAGES, Pair, hold_out
from recipes.common.moses import Tokeniser, tokenise_pairs
from recipes.common.session import Recipe, Session, entry
from recipes.common.sources import fetch, say_source
from recipes.common.training import train
from recipes.wmt14_en_de.raw_text import SHA256, URLS, read_newstest2014, read_training

NAME = "wmt14_en_de"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
VALID_EVERY = 100  # every 100th training pair is for validation
VOCABULARY = 32_000  # BPE pieces of both languages
LONGEST, RATIO = 250, 1.5  # of a training pair, in pieces
BATCH_TOKENS = 8192 * 16
DEVICE_TOKENS = 8192
SEARCH = "--beam 4 --lenpen 0.6".split()
AVERAGED = 5  # checkpoints

SMOKE_SIZES = {"train": 2000, "valid": 1, "test": 50}
SMOKE_VOCABULARY = 1000
SMOKE_VALID_EVERY = 20
SMOKE_BATCH_TOKENS = 1024

Read = Callable[[], Tuple[Iterable[Pair], List[Pair]]]


def prepare(session: Session) -> None:
    """Raw text -> Moses tokens -> BPE pieces -> binarised data."""
    options = session.options
    every = SMOKE_VALID_EVERY if options.smoke else VALID_EVERY

    def read() -> Tuple[Iterable[Pair], List[Pair]]:
        if session.small:
            corpus = smoke.small_corpus(SMOKE_SIZES)
            return corpus["train"], corpus["test"]
        folder = fetch(session, URLS, SHA256)
        return read_training(folder), read_newstest2014(folder)

    settings = {"raw": str(options.raw_dir), "smoke": options.smoke, "every": every}
    does = f"{say_source(session, URLS)}; normalises punctuation, tokenises, splits dashes"
    session.step("text", moses_translation.text_folder(session), settings, does, make_text, read, every, options.workers)
    vocabulary = SMOKE_VOCABULARY if options.smoke else VOCABULARY
    moses_translation.prepare_pieces(session, LANGUAGES, vocabulary, LONGEST, RATIO)


def make_text(read: Read, every: int, workers: int, folder: Path, console: Console) -> None:
    """Make folder/raw with the test set and folder/tokens with all splits."""
    training, test = read()
    tokenisers = [Tokeniser(language, normalise=True, split_dashes=True) for language in LANGUAGES]
    plain = [Tokeniser(language, split_dashes=True) for language in LANGUAGES]  # the test set is not normalised
    quoted = (Pair(*(sentence.replace("’", "'") for sentence in pair)) for pair in test)
    tokens = chain(
        hold_out(tokenise_pairs(training, *tokenisers, workers=workers), every),
        (("test", pair) for pair in tokenise_pairs(quoted, *plain)),
    )
    moses_translation.write_text(folder, LANGUAGES, test, tokens, console)


def train_model(session: Session) -> None:
    """Train with the settings of wmt14_en_de.yaml."""
    train(session, CONFIG, session.data / "bin", BATCH_TOKENS, DEVICE_TOKENS, smoke=(SMOKE_BATCH_TOKENS, moses_translation.SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the average of the last checkpoints: tokenised BLEU, and sacreBLEU of the detokenised text on raw references.

    Because dashes are separate tokens, tokenised BLEU is what papers report after compound splitting.
    """
    checkpoint = moses_translation.averaged(session, AVERAGED)
    moses_translation.evaluate(session, checkpoint, LANGUAGES, SEARCH)


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate)

if __name__ == "__main__":
    entry(RECIPE)
