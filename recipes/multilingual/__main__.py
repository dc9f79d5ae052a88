"""English into many languages: OPUS-100 (Zhang et al., 2020; arXiv 2004.11867), or with --cldr a corpus that needs no download.

A tag in front of the English sentence, such as <2de>, asks for the language: fairseq's task is plain `translation`, with one
dictionary. Training pairs are taken as they are, without temperature. BLEU, chrF and the experts by language.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from recipes.common import translation
from recipes.common.cldr import MANY, make_cldr, tag
from recipes.common.corpus import Pair
from recipes.common.pairs import make_data
from recipes.common.session import Recipe, Session, check_numbers, entry
from recipes.common.sources import downloads, fetch
from recipes.common.training import USER_DIR, age, checkpoint_of, train
from recipes.multilingual.by_language import count_experts, read_counts, read_languages, scores, show
from recipes.multilingual.raw_text import ADDRESS, LANGUAGES, SHA256, read_opus100, urls_of

NAME = "multilingual"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
SIDES = ("en", "xx")  # fairseq's names of the source, and of the target, which has several languages
LONGEST = 250  # pieces on either side of a training pair
BATCH_TOKENS = 8 * 8192
DEVICE_TOKENS = 8192
SEARCH = "--beam 4 --max-len-a 2 --max-len-b 20".split()
# for OPUS-100, whose scripts have thousands of rare characters
VOCABULARY = 64_000
PIECES = {"kind": "bpe", "character_coverage": 0.9999, "input_sentence_size": 5_000_000, "shuffle_input_sentence": True}

# for --cldr: pairs of a language, and the model of the quickstart
CLDR_PAIRS, CLDR_HELD_OUT, CLDR_VOCABULARY, CLDR_SEED = 4000, 50, 2000, 1
CLDR_PIECES = {"split_digits": True}
CLDR_BATCH_TOKENS = 2048
CLDR = {
    "model._name": "transformer_moe_tiny",
    "model.moe_freq": 1,
    **{f"model.{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"model.{side}_embed_dim": 64 for side in ("encoder", "decoder")},
    **{f"model.{side}_ffn_embed_dim": 128 for side in ("encoder", "decoder")},
    **{f"model.{side}_attention_heads": 2 for side in ("encoder", "decoder")},
    "model.dropout": 0.0,
    "optimization.lr": [0.005],
    "optimization.clip_norm": 1.0,
    "optimization.max_update": 1000,
    "lr_scheduler.warmup_updates": 100,
    "dataset.validate_interval_updates": 100,
    "checkpoint.save_interval_updates": 100,
    "common.log_interval": 20,
    "criterion.moe_load_interval": 20,
}

# for --smoke: fewer pairs, and fewer updates of the model of --cldr
SMOKE_PAIRS, SMOKE_HELD_OUT = 2500, 10
SMOKE = {**CLDR, "optimization.max_update": 500}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this recipe."""
    cldr = f"text made from Unicode CLDR instead of OPUS-100, and a small model; no download; up to {len(MANY)} languages"
    parser.add_argument("--cldr", action="store_true", help=cldr)
    group = parser.add_argument_group("prepare")
    targets = f"target languages, two or more (default: {' '.join(MANY)})"
    group.add_argument("--targets", nargs="+", default=MANY, metavar="LANGUAGE", help=targets)
    pairs = f"training pairs of a language (default: all, up to a million; {CLDR_PAIRS:,} with --cldr, where 900 are names)"
    group.add_argument("--pairs", type=int, metavar="N", help=pairs)
    group.add_argument(
        "--vocabulary", type=int, metavar="N",
        help=f"pieces of all languages (default: {VOCABULARY:,}; {CLDR_VOCABULARY:,} with --cldr)",
    )  # fmt: skip


def prepare(session: Session) -> None:
    """Download OPUS-100 unless --raw-dir, --cldr or --smoke is given; segment the text into pieces and binarise it."""
    options = session.options
    check_numbers(options, {"pairs": 1})
    targets = targets_of(session)
    cldr = makes_cldr(session)
    vocabulary = options.vocabulary or (CLDR_VOCABULARY if cldr or options.smoke else VOCABULARY)
    sizes = cldr_sizes(session, len(targets)) if cldr else {}
    settings = {"raw": str(options.raw_dir), "sizes": sizes, "pairs": options.pairs, "targets": targets, "vocabulary": vocabulary}

    def read() -> Mapping[str, Iterable[Pair]]:
        if cldr:
            return make_cldr(sizes, CLDR_SEED, targets)
        return read_opus100(fetch(session, urls_of(targets), SHA256), targets, options.pairs)

    pieces: Dict[str, Any] = {**(CLDR_PIECES if cldr else PIECES), "user_defined_symbols": [*map(tag, targets)]}
    make = partial(make_data, read, vocabulary, 1 if cldr else options.workers, languages=SIDES, longest=LONGEST, **pieces)
    does = f"{source_of(session, targets)}; {vocabulary:,} sentencepiece pieces; fairseq-preprocess"
    session.step("data", session.data, settings, does, make)


def cldr_sizes(session: Session, languages: int) -> Dict[str, int]:
    """Pairs of each split of the CLDR corpus, of all languages together."""
    pairs, held_out = (SMOKE_PAIRS, SMOKE_HELD_OUT) if session.options.smoke else (CLDR_PAIRS, CLDR_HELD_OUT)
    return {"train": languages * (session.options.pairs or pairs), "valid": languages * held_out, "test": languages * held_out}


def makes_cldr(session: Session) -> bool:
    """Whether the text is made from CLDR. Raises ConfigurationError for --cldr with --raw-dir."""
    if session.options.cldr and session.options.raw_dir is not None:
        raise ConfigurationError("--cldr makes its own text; leave out --raw-dir, or leave out --cldr to use OPUS-100 from there")
    return session.options.cldr or session.small


def targets_of(session: Session) -> List[str]:
    """The target languages. Raises ConfigurationError for unknown ones, or a single one."""
    targets = list(dict.fromkeys(session.options.targets))
    known, corpus = (MANY, "the CLDR corpus") if makes_cldr(session) else (LANGUAGES, "OPUS-100, or has no test set there")
    for target in targets:
        if target not in known:
            raise ConfigurationError(f"--targets {target} is not in {corpus}; choose from {', '.join(sorted(known))}")
    if len(targets) == 1:
        raise ConfigurationError(f"--targets {targets[0]} is one language; give two or more")
    return targets


def source_of(session: Session, targets: List[str]) -> str:
    """Where the text comes from, for --dry-run."""
    if makes_cldr(session):
        return f"makes English into {len(targets)} languages from CLDR"
    if session.options.raw_dir is not None:
        return f"reads OPUS-100 in {len(targets)} languages from {session.options.raw_dir}"
    return f"downloads {', '.join(urls_of(targets))} from {ADDRESS} to {downloads(session)}"


def train_model(session: Session) -> None:
    """Train with the settings of multilingual.yaml, and those above for --cldr and --smoke."""
    small = makes_cldr(session)
    batch_tokens, device_tokens = (CLDR_BATCH_TOKENS, CLDR_BATCH_TOKENS) if small else (BATCH_TOKENS, DEVICE_TOKENS)
    settings = CLDR if small else None
    train(session, CONFIG, session.data / "bin", batch_tokens, device_tokens, settings, smoke=(CLDR_BATCH_TOKENS, SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the best checkpoint: sacreBLEU and chrF by language, and the experts that each language uses on the test set."""
    checkpoint = checkpoint_of(session)
    binary, raw = session.data / "bin", session.data / "raw"
    source, reference = (raw / f"test.{side}" for side in SIDES)
    test, experts = (session.out / f"{session.run.name}-{part}" for part in ("test", "experts"))
    command = translation.generate_command(binary, str(USER_DIR), checkpoint, SEARCH, session.gpus == 0)
    translation.translate_step(session, test, command, {"command": command, "checkpoint": age(checkpoint)}, reference)
    routed = session.options.router != DENSE
    if routed:
        does = "counts the experts' tokens by language on the test set, and plots them"
        count = partial(count_experts, checkpoint, binary, session.run.name)
        session.step("experts by language", experts, {"checkpoint": age(checkpoint)}, does, count)
    if session.options.dry_run:
        return
    hypotheses, references = map(translation.read_sentences, (test / translation.TRANSLATION, reference))
    found = scores(read_languages(source), hypotheses, references, read_counts(experts) if routed else None)
    show(found, session.console)
    session.results(found)


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate, add_options)

if __name__ == "__main__":
    entry(RECIPE)
