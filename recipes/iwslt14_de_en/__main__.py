"""IWSLT'14 German-English: 160,000 pairs from talks, trained like fairseq's transformer_iwslt_de_en, with experts.

Lowercased Moses tokens in 10,000 BPE pieces; beam 5, best checkpoint; tokenised BLEU and sacreBLEU, both lowercased.
"""

from itertools import chain
from pathlib import Path
from typing import Callable, List, Tuple

from rich.console import Console

from recipes.common import moses_translation, smoke
from recipes.common.corpus import Pair, clean, hold_out
from recipes.common.moses import Tokeniser, tokenise_pairs
from recipes.common.session import Recipe, Session, entry
from recipes.common.sources import fetch, say_source
from recipes.common.training import checkpoint_of, train
from recipes.iwslt14_de_en.raw_text import LANGUAGES, URLS, read_test, read_training

NAME = "iwslt14_de_en"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
VALID_EVERY = 23  # every 23rd training pair is for validation
VOCABULARY = 10_000  # BPE pieces of both languages
LONGEST, RATIO = 175, 1.5  # of a training pair, in tokens
BATCH_TOKENS = 4096
DEVICE_TOKENS = 4096
SEARCH = "--beam 5".split()

SMOKE_SIZES = {"train": 2000, "valid": 1, "test": 50}
SMOKE_VOCABULARY = 1000
SMOKE_BATCH_TOKENS = 1024

Read = Callable[[], Tuple[List[Pair], List[Pair]]]


def prepare(session: Session) -> None:
    """Raw text -> lowercased Moses tokens -> BPE pieces -> binarised data."""
    options = session.options

    def read() -> Tuple[List[Pair], List[Pair]]:
        if session.small:
            corpus = smoke.small_corpus(SMOKE_SIZES)  # English to German
            training, test = ([Pair(pair.target, pair.source) for pair in corpus[split]] for split in ("train", "test"))
            return training, test
        folder = fetch(session, URLS)
        return read_training(folder), read_test(folder)

    settings = {"raw": str(options.raw_dir), "smoke": options.smoke}
    does = f"{say_source(session, URLS)}; tokenises and lowercases"
    session.step("text", moses_translation.text_folder(session), settings, does, make_text, read, options.workers)
    vocabulary = SMOKE_VOCABULARY if options.smoke else VOCABULARY
    moses_translation.prepare_pieces(session, LANGUAGES, vocabulary)


def make_text(read: Read, workers: int, folder: Path, console: Console) -> None:
    """Make folder/raw with the test set and folder/tokens with all splits."""
    training, test = read()
    tokenisers = [Tokeniser(language, lowercase=True) for language in LANGUAGES]
    kept = clean(tokenise_pairs(training, *tokenisers, workers=workers), LONGEST, RATIO)
    quoted = (Pair(*(sentence.replace("’", "'") for sentence in pair)) for pair in test)
    tokens = chain(hold_out(kept, VALID_EVERY), (("test", pair) for pair in tokenise_pairs(quoted, *tokenisers)))
    moses_translation.write_text(folder, LANGUAGES, test, tokens, console)


def train_model(session: Session) -> None:
    """Train with the settings of iwslt14_de_en.yaml."""
    train(session, CONFIG, session.data / "bin", BATCH_TOKENS, DEVICE_TOKENS, smoke=(SMOKE_BATCH_TOKENS, moses_translation.SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the best checkpoint: tokenised BLEU, and sacreBLEU of the detokenised text, both lowercased."""
    moses_translation.evaluate(session, checkpoint_of(session), LANGUAGES, SEARCH, lowercase=True)


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate)

if __name__ == "__main__":
    entry(RECIPE)
