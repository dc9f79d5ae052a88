"""The steps of the quickstart: prepare, train, translate, score. Each fills a folder; see steps.py for when it is run."""

import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from rich.console import Console

import fairseq_sparsemixer
from fairseq_sparsemixer.tools.runs import LOAD_LOG, TRAIN_LOG, read_run
from recipes.common import translation
from recipes.common.binarisation import translation_command
from recipes.common.corpus import LANGUAGES, SPLITS, Corpus, write_corpus
from recipes.common.progress import Meter, run_program, script
from recipes.common.segmentation import learn_pieces, segment_file
from recipes.common.training import read_log_line
from recipes.common.translation import EVERY_SENTENCE, generate_command, read_sentences, sacre_bleu

SOURCE, TARGET = LANGUAGES
USER_DIR = os.path.relpath(Path(fairseq_sparsemixer.__file__).parent)
LOG_INTERVAL = 20  # updates between two lines of fairseq's log, and of the expert load's

# Pre-norm, tied embeddings, two layers a stack of which the first has experts. Every token meets the same number of
# parameters with experts as without: an expert is as wide as the dense feed-forward network.
MODEL = (
    "--arch transformer_moe_tiny --encoder-layers 2 --decoder-layers 2"
    " --encoder-embed-dim 128 --decoder-embed-dim 128 --encoder-ffn-embed-dim 512 --decoder-ffn-embed-dim 512"
    " --encoder-attention-heads 4 --decoder-attention-heads 4 --share-all-embeddings"
    " --encoder-normalize-before --decoder-normalize-before --num-experts 4 --moe-freq 2"
).split()
CRITERION = "--criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --moe-balance-loss-weight 0.01".split()
OPTIMIZER = (
    "--optimizer adam --adam-betas (0.9,0.98) --clip-norm 1.0 --lr 0.003 --lr-scheduler inverse_sqrt --warmup-updates 100"
).split()
SEARCH = "--beam 4 --max-len-a 1.5 --max-len-b 10".split()


def prepare(make_corpus: Callable[[], Corpus], vocabulary: int, folder: Path, console: Console) -> None:
    """folder/raw, folder/pieces (sentencepiece), and folder/bin (fairseq-preprocess)."""
    raw, pieces, binary = folder / "raw", folder / "pieces", folder / "bin"
    corpus = make_corpus()
    write_corpus(corpus, raw)
    sizes = ", ".join(f"{split} {len(pairs):,}" for split, pairs in corpus.items())
    console.print(f"{sizes} pairs; the first: {corpus['test'][0].source!r} -> {corpus['test'][0].target!r}", highlight=False)
    with console.status("sentencepiece"):
        model = learn_pieces([raw / f"train.{language}" for language in LANGUAGES], pieces, vocabulary, split_digits=True)
        for split in SPLITS:
            for language in LANGUAGES:
                segment_file(model, raw / f"{split}.{language}", pieces / f"{split}.{language}")
    with console.status("fairseq-preprocess"):
        run_program(translation_command(pieces, binary, workers=1), folder / "console.log", console)


def train_command(data: Path, folder: Path, router: str, updates: int, dropout: float, seed: int) -> List[str]:
    """fairseq-train for one router; everything else is the same for all."""
    return [
        *(script("fairseq-train"), str(data / "bin"), "--user-dir", USER_DIR, "--task", "translation", "--cpu"),
        *MODEL,
        *("--router", router, "--dropout", str(dropout)),
        *CRITERION,
        *OPTIMIZER,
        *("--max-tokens", "2048", "--max-update", str(updates), "--seed", str(seed), *EVERY_SENTENCE),
        *("--validate-interval-updates", "100", "--save-interval-updates", "100", "--keep-interval-updates", "1"),
        *("--no-epoch-checkpoints", "--save-dir", str(folder)),
        *("--log-format", "json", "--log-interval", str(LOG_INTERVAL), "--log-file", str(folder / TRAIN_LOG)),
        *("--moe-load-file", str(folder / LOAD_LOG), "--moe-load-interval", str(LOG_INTERVAL)),
    ]


def train(command: List[str], updates: int, folder: Path, console: Console) -> None:
    """Run it; fairseq goes on from folder/checkpoint_last.pt where there is one."""
    run_program(command, folder / "console.log", console, Meter(updates, "updates", read_log_line))


def translate(data: Path, checkpoint: Path, folder: Path, console: Console) -> None:
    """The test set by beam search: folder/translation.txt, in the order of the test set."""
    total = len(read_sentences(data / "raw" / f"test.{TARGET}"))
    translation.translate(generate_command(data / "bin", USER_DIR, checkpoint, SEARCH, on_cpu=True), total, folder, console)


def score(data: Path, run: Path, translated: Path) -> Dict[str, Any]:
    """The figures of a trained and translated run: what fairseq logged, parameters, and sacreBLEU on the raw references."""
    bleu = sacre_bleu(read_sentences(translated), read_sentences(data / "raw" / f"test.{TARGET}"))
    total, active = _count_parameters(run / "checkpoint_best.pt")
    return {**read_run(run).figures(), "parameters": total, "active_parameters": active, **bleu}


def _count_parameters(checkpoint: Path) -> Tuple[int, int]:
    from fairseq import checkpoint_utils  # seconds to load, and not needed where everything was done before

    from fairseq_sparsemixer.plugin.models import parameter_counts

    (model,), _ = checkpoint_utils.load_model_ensemble([str(checkpoint)])
    return parameter_counts(model)
