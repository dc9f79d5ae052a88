"""The steps of the quickstart: prepare, train, translate, score. Each fills a folder; see steps.py for when it is run."""

import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import sacrebleu
import sentencepiece
from rich.console import Console

import fairseq_sparsemixer
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.runs import LOAD_LOG, TRAIN_LOG, read_run
from recipes.quickstart.corpus import LANGUAGES, SPLITS, Corpus, write_corpus
from recipes.quickstart.progress import Advance, Meter, run_program, script

SOURCE, TARGET = LANGUAGES
USER_DIR = os.path.relpath(Path(fairseq_sparsemixer.__file__).parent)
LOG_INTERVAL = 20  # updates between two lines of fairseq's log, and of the expert load's
PROGRESS_STEP = 100  # translated sentences between two lines of progress

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
EVERY_SENTENCE = "--required-batch-size-multiple 1".split()  # under its default, 8, fairseq drops a split's last sentences
SEARCH = "--beam 4 --max-len-a 1.5 --max-len-b 10".split()


def prepare(make_corpus: Callable[[], Corpus], vocabulary: int, folder: Path, console: Console) -> None:
    """folder/raw, folder/pieces (sentencepiece), and folder/bin (fairseq-preprocess)."""
    raw, pieces, binary = folder / "raw", folder / "pieces", folder / "bin"
    corpus = make_corpus()
    write_corpus(corpus, raw)
    sizes = ", ".join(f"{split} {len(pairs):,}" for split, pairs in corpus.items())
    console.print(f"{sizes} pairs; the first: {corpus['test'][0].source!r} -> {corpus['test'][0].target!r}", highlight=False)
    with console.status("sentencepiece"):
        _segment(raw, pieces, vocabulary)
    command = [script("fairseq-preprocess"), "--source-lang", SOURCE, "--target-lang", TARGET, "--joined-dictionary"]
    for split in SPLITS:
        command += [f"--{split}pref", str(pieces / split)]
    command += ["--destdir", str(binary)]
    with console.status("fairseq-preprocess"):
        run_program(command, folder / "console.log", console)


def _segment(raw: Path, pieces: Path, vocabulary: int) -> None:
    """raw/* -> pieces/*, by a model of both languages' training text."""
    pieces.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=[str(raw / f"train.{language}") for language in LANGUAGES],
        model_prefix=str(pieces / "model"),
        vocab_size=vocabulary,
        hard_vocab_limit=False,  # a small corpus may not have that many
        character_coverage=1.0,
        split_digits=True,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "model.model"))
    for split in SPLITS:
        for language in LANGUAGES:
            lines = (raw / f"{split}.{language}").read_text(encoding="utf-8").splitlines()
            text = "".join(" ".join(words) + "\n" for words in model.encode(lines, out_type=str))
            (pieces / f"{split}.{language}").write_text(text, encoding="utf-8")


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

    def read_line(line: str) -> Optional[Advance]:
        if "| train_inner | {" not in line:
            return None
        log = json.loads(line[line.index("{") :])
        return Advance(int(log["num_updates"]), f"loss {log['loss']}, {float(log['wps']):,.0f} words/s")

    run_program(command, folder / "console.log", console, Meter(updates, "updates", read_line))


def translate(data: Path, checkpoint: Path, folder: Path, console: Console) -> None:
    """The test set by beam search: folder/translation.txt, in the order of the test set."""
    total = len((data / "raw" / f"test.{TARGET}").read_text(encoding="utf-8").splitlines())
    command = [script("fairseq-generate"), str(data / "bin"), "--user-dir", USER_DIR, "--cpu", "--path", str(checkpoint), *SEARCH]
    command += ["--gen-subset", "test", "--max-tokens", "4096", "--post-process", "sentencepiece", *EVERY_SENTENCE]
    sentences: Dict[int, str] = {}

    def read_line(line: str) -> Optional[Advance]:
        if line.startswith("D-"):  # D-<number> <tab> score <tab> text
            number, _, text = line.rstrip("\n").split("\t")
            sentences[int(number[2:])] = text
            if len(sentences) % PROGRESS_STEP == 0:
                return Advance(len(sentences), text)
        return None

    run_program(command, folder / "console.log", console, Meter(total, "sentences", read_line))
    if len(sentences) != total:
        raise ConfigurationError(f"{len(sentences)} of {total} sentences were translated; see {folder / 'console.log'}")
    text = "".join(sentences[number] + "\n" for number in range(total))
    (folder / "translation.txt").write_text(text, encoding="utf-8")


def score(data: Path, run: Path, translation: Path) -> Dict[str, Any]:
    """The figures of a trained and translated run: what fairseq logged, parameters, and sacreBLEU on the raw references."""
    hypotheses, references = (
        path.read_text(encoding="utf-8").splitlines() for path in (translation, data / "raw" / f"test.{TARGET}")
    )
    bleu = sacrebleu.BLEU()
    result = bleu.corpus_score(hypotheses, [references])
    total, active = _count_parameters(run / "checkpoint_best.pt")
    figures = {"parameters": total, "active_parameters": active, "bleu": result.score, "signature": str(bleu.get_signature())}
    return {**read_run(run).figures(), **figures}


def _count_parameters(checkpoint: Path) -> Tuple[int, int]:
    from fairseq import checkpoint_utils  # seconds to load, and not needed where everything was done before

    from fairseq_sparsemixer.models import parameter_counts

    (model,), _ = checkpoint_utils.load_model_ensemble([str(checkpoint)])
    return parameter_counts(model)
