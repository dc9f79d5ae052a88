"""Multi30k, English to German (Elliott et al., 2016; arXiv 1605.00459): image captions, 29,000 pairs.

The smallest recipe, minutes on a GPU: a 4-layer transformer of width 128 with experts in every second layer, on raw text in
sentencepiece pieces; sacreBLEU on test_2016_flickr.
"""

import argparse
from pathlib import Path

from recipes.common import smoke, translation
from recipes.common.corpus import LANGUAGES, Corpus
from recipes.common.pairs import make_data
from recipes.common.session import Recipe, Session, entry
from recipes.common.sources import fetch, say_source
from recipes.common.training import USER_DIR, age, checkpoint_of, train
from recipes.multi30k_en_de.raw_text import FILES, read_multi30k

NAME = "multi30k_en_de"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
ADDRESS = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
URLS = {f"{name}.{language}.gz": f"{ADDRESS}/{name}.{language}.gz" for name in FILES.values() for language in LANGUAGES}
VOCABULARY = 8000  # pieces of both languages
BATCH_TOKENS = 8192
DEVICE_TOKENS = 8192
SEARCH = "--beam 5 --lenpen 1.0".split()

# for --smoke
SMOKE_SIZES = {"train": 2000, "valid": 100, "test": 50}
SMOKE_VOCABULARY = 1000
SMOKE = {
    "model.encoder_layers": 2,
    "model.decoder_layers": 2,
    "model.encoder_embed_dim": 32,
    "model.decoder_embed_dim": 32,
    "model.encoder_ffn_embed_dim": 64,
    "model.decoder_ffn_embed_dim": 64,
    "model.dropout": 0.0,
    "lr_scheduler.warmup_updates": 20,
    "optimization.max_update": 100,
    "common.log_interval": 10,
}
SMOKE_BATCH_TOKENS = 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the option of this recipe."""
    parser.add_argument(
        "--vocabulary", type=int, metavar="N", help=f"prepare: vocabulary size in pieces (default: {VOCABULARY:,})"
    )


def prepare(session: Session) -> None:
    """Segment the raw text into pieces and binarise it."""
    options = session.options
    vocabulary = options.vocabulary or (SMOKE_VOCABULARY if options.smoke else VOCABULARY)
    settings = {"raw": str(options.raw_dir), "smoke": options.smoke, "vocabulary": vocabulary}

    def read() -> Corpus:
        return smoke.small_corpus(SMOKE_SIZES) if session.small else read_multi30k(fetch(session, URLS))

    does = f"{say_source(session, URLS)}; {vocabulary:,} sentencepiece pieces, fairseq-preprocess"
    session.step("data", session.data, settings, does, make_data, read, vocabulary, 1 if session.small else options.workers)


def train_model(session: Session) -> None:
    """Train with the settings of multi30k_en_de.yaml."""
    train(session, CONFIG, session.data / "bin", BATCH_TOKENS, DEVICE_TOKENS, smoke=(SMOKE_BATCH_TOKENS, SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the best checkpoint: sacreBLEU against the raw references."""
    checkpoint = checkpoint_of(session)
    test = session.out / f"{session.run.name}-test"
    command = translation.generate_command(session.data / "bin", str(USER_DIR), checkpoint, SEARCH, session.gpus == 0)
    reference = session.data / "raw" / "test.de"
    settings = {"command": command, "checkpoint": age(checkpoint)}
    translation.translate_step(session, test, command, settings, reference)
    if not session.options.dry_run:
        hypotheses = translation.read_sentences(test / translation.TRANSLATION)
        session.results(translation.sacre_bleu(hypotheses, translation.read_sentences(reference)))


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate, add_options)

if __name__ == "__main__":
    entry(RECIPE)
