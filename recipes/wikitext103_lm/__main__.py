"""WikiText-103 (Merity et al., 2016): a 16-layer language model with adaptive inputs and softmax (arXiv 1809.10853).

Experts in every second layer; perplexity per word of the test set, with at least 400 words of context (--context-window).
"""

from pathlib import Path
from typing import Any, Callable, Dict, Optional

from rich.console import Console

from fairseq_sparsemixer.tools.generation import read_perplexity
from recipes.common import smoke
from recipes.common.binarisation import text_command
from recipes.common.progress import run_program, script
from recipes.common.session import Recipe, Session, entry
from recipes.common.sources import fetch, say_source
from recipes.common.text import Splits, last_figures, read_wikitext, write_splits
from recipes.common.training import USER_DIR, age, checkpoint_of, train

NAME = "wikitext103_lm"
CONFIG = Path(__file__).with_name(f"{NAME}.yaml")
ARCHIVE = "wikitext-103-v1.zip"
URLS = {ARCHIVE: f"https://s3.amazonaws.com/research.metamind.io/wikitext/{ARCHIVE}"}  # as in fairseq's prepare-wikitext-103.sh
SHA256 = {ARCHIVE: "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590"}  # published by several users
MEMBERS = {split: f"wikitext-103/wiki.{split}.tokens" for split in ("train", "valid", "test")}
BATCH_TOKENS = 8 * 3 * 3072  # 8 GPUs, 3 micro-batches
DEVICE_TOKENS = 3072
CONTEXT = 400  # words of context before each scored word, in windows of 512

# for --smoke: WikiText-2's test part, words that occur at least five times
SMOKE_THRESHOLD = 5
SMOKE_BATCH_TOKENS = 1024
SMOKE_CONTEXT = 32
SMOKE = {
    "task.tokens_per_sample": 64,
    "model.decoder_layers": 2,
    "model.decoder_embed_dim": 64,
    "model.decoder_ffn_embed_dim": 128,
    "model.decoder_attention_heads": 2,
    "model.dropout": 0.0,
    "model.adaptive_input_cutoff": "50,200",
    "model.adaptive_softmax_cutoff": "50,200",
    "lr_scheduler.warmup_updates": 20,
    "lr_scheduler.lr_period_updates": 80,
    "optimization.max_update": 100,
    "common.log_interval": 10,
    "dataset.validate_interval_updates": 100,
}


def prepare(session: Session) -> None:
    """Binarise the words; line ends and empty lines are kept, as in fairseq's own results."""
    options = session.options

    def read() -> Splits:
        return smoke.small_text() if session.small else read_wikitext(fetch(session, URLS, SHA256), ARCHIVE, MEMBERS)

    does = f"{say_source(session, URLS)}; fairseq-preprocess"
    threshold = SMOKE_THRESHOLD if options.smoke else 0
    settings = {"raw": str(options.raw_dir), "threshold": threshold}
    session.step("data", session.data, settings, does, make_data, read, threshold, 1 if session.small else options.workers)


def make_data(read: Callable[[], Splits], threshold: int, workers: int, folder: Path, console: Console) -> None:
    """Make folder/words and folder/bin."""
    write_splits(read(), folder / "words", console)
    command = text_command(folder / "words", folder / "bin", workers, "--thresholdsrc", str(threshold))
    run_program(command, folder / "console.log", console)


def train_model(session: Session) -> None:
    """Train with the settings of wikitext103_lm.yaml."""
    train(session, CONFIG, session.data / "bin", BATCH_TOKENS, DEVICE_TOKENS, smoke=(SMOKE_BATCH_TOKENS, SMOKE))


def evaluate(session: Session) -> None:
    """Evaluate the perplexity per word of the test set."""
    checkpoint = checkpoint_of(session)
    context, window = (SMOKE_CONTEXT, 64) if session.options.smoke else (CONTEXT, 512)
    test = session.out / f"{session.run.name}-test"
    command = [script("fairseq-eval-lm"), str(session.data / "bin"), "--user-dir", str(USER_DIR), "--path", str(checkpoint)]
    command += ["--gen-subset", "test", "--tokens-per-sample", str(window), "--context-window", str(context)]
    command += ["--max-tokens", "3072", "--required-batch-size-multiple", "1", *(["--cpu"] if session.gpus == 0 else [])]
    session.command("perplexity of the test set", test, command, {"command": command, "checkpoint": age(checkpoint)})
    if not session.options.dry_run:
        session.results({**last_figures(test / "console.log", read_result), "context": context})


def read_result(line: str) -> Optional[Dict[str, Any]]:
    """The results in fairseq-eval-lm's last line; None for other lines."""
    found = read_perplexity(line)
    return dict(zip(("loss_in_bits", "perplexity"), found)) if found else None


RECIPE = Recipe(NAME, CONFIG, __doc__, prepare, train_model, evaluate)

if __name__ == "__main__":
    entry(RECIPE)
