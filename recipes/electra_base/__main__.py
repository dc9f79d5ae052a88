"""ELECTRA-Base pre-training (Clark et al., 2020; arXiv 2003.10555) with experts in the discriminator.

Trains on the raw text of WikiText-103, the largest corpus that can be downloaded; the paper's Wikipedia and books work the same
way with --raw-dir. Evaluates the detection of replaced tokens on held-out text; `recipes.glue` fine-tunes the result.
"""

import json
from pathlib import Path
from typing import Any, Callable, Dict, Optional

from rich.console import Console

from recipes.common import smoke
from recipes.common.binarisation import text_command
from recipes.common.corpus import SPLITS
from recipes.common.progress import run_program, script
from recipes.common.segmentation import learn_pieces, segment_file
from recipes.common.session import Recipe, Session, entry
from recipes.common.sources import fetch, say_source
from recipes.common.text import Splits, last_figures, read_wikitext, write_splits
from recipes.common.training import USER_DIR, age, checkpoint_of, train

NAME = "electra_base"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
ARCHIVE = "wikitext-103-raw-v1.zip"
URLS = {ARCHIVE: f"https://s3.amazonaws.com/research.metamind.io/wikitext/{ARCHIVE}"}  # as in fairseq's RoBERTa pre-training
SHA256 = {ARCHIVE: "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"}  # published by several users
MEMBERS = {split: f"wikitext-103-raw/wiki.{split}.raw" for split in SPLITS}
VOCABULARY = 30_000  # sentencepiece pieces
BATCH_TOKENS = 256 * 512  # Table 6 of the paper: 256 blocks of 512
DEVICE_TOKENS = 16_384
FIGURES = ("mlm_loss", "ppl", "mlm_accuracy", "rtd_loss", "rtd_accuracy", "rtd_precision", "rtd_recall")

SMOKE_VOCABULARY = 1000
SMOKE_BATCH_TOKENS = 2048
SMOKE = {
    "task.tokens_per_sample": 64,
    "model._name": "electra_moe_tiny",
    "lr_scheduler.warmup_updates": 20,
    "optimization.lr": [0.001],
    "optimization.max_update": 100,
    "common.log_interval": 10,
    "dataset.validate_interval_updates": 100,
}


def prepare(session: Session) -> None:
    """Segment the text into pieces and binarise it."""
    options = session.options
    vocabulary = SMOKE_VOCABULARY if options.smoke else VOCABULARY

    def read() -> Splits:
        return smoke.small_text() if session.small else read_wikitext(fetch(session, URLS, SHA256), ARCHIVE, MEMBERS)

    does = f"{say_source(session, URLS)}; {vocabulary:,} sentencepiece pieces, fairseq-preprocess"
    settings = {"raw": str(options.raw_dir), "smoke": options.smoke, "vocabulary": vocabulary}
    session.step("data", session.data, settings, does, make_data, read, vocabulary, 1 if session.small else options.workers)


def make_data(read: Callable[[], Splits], vocabulary: int, workers: int, folder: Path, console: Console) -> None:
    """Make folder/raw, folder/pieces and folder/bin."""
    raw, pieces = folder / "raw", folder / "pieces"
    write_splits(read(), raw, console)
    # more takes memory and changes little
    sample: Dict[str, Any] = {"input_sentence_size": 1_000_000, "shuffle_input_sentence": True}
    model = learn_pieces([raw / "train"], pieces, vocabulary, **sample)
    for split in SPLITS:
        segment_file(model, raw / split, pieces / split)
    run_program(text_command(pieces, folder / "bin", workers), folder / "console.log", console)


def train_model(session: Session) -> None:
    """Train with the settings of electra_base.yaml."""
    train(session, CONFIG, session.data / "bin", BATCH_TOKENS, DEVICE_TOKENS, smoke=(SMOKE_BATCH_TOKENS, SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the generator's loss and the discriminator's accuracy on the test set."""
    checkpoint = checkpoint_of(session)
    test = session.out / f"{session.run.name}-test"
    command = [script("fairseq-validate"), str(session.data / "bin"), "--user-dir", str(USER_DIR), "--task", "masked_lm"]
    command += ["--criterion", "electra", "--path", str(checkpoint), "--valid-subset", "test", "--max-tokens", "8192"]
    command += ["--log-format", "json", "--required-batch-size-multiple", "1", *(["--cpu"] if session.gpus == 0 else [])]
    session.command("detection on the test set", test, command, {"command": command, "checkpoint": age(checkpoint)})
    if not session.options.dry_run:
        session.results(last_figures(test / "console.log", read_figures))


def read_figures(line: str) -> Optional[Dict[str, Any]]:
    """The FIGURES in a line of fairseq-validate's JSON log; None if it has none."""
    if '"test_rtd_accuracy"' not in line:
        return None
    log = json.loads(line[line.index("{") :])
    return {name: float(log[f"test_{name}"]) for name in FIGURES if f"test_{name}" in log}


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate)

if __name__ == "__main__":
    entry(RECIPE)
