"""Steps shared by recipes on tokenised text: tokens -> binarised data, and checkpoint -> tokenised BLEU and sacreBLEU."""

import math
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Iterable, List, Sequence, Tuple

from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.averaging import average
from recipes.common import translation
from recipes.common.averaging import last_checkpoints
from recipes.common.binarisation import translation_command
from recipes.common.corpus import Pair, clean, read_split, write_pairs
from recipes.common.moses import detokeniser
from recipes.common.progress import run_program
from recipes.common.segmentation import learn_pieces, segment_file
from recipes.common.session import Session
from recipes.common.steps import fingerprint_of
from recipes.common.training import USER_DIR, age, checkpoint_of

SMOKE = {
    "model._name": "transformer_moe_tiny",
    "model.dropout": 0.0,
    "lr_scheduler.warmup_updates": 20,
    "optimization.max_update": 60,
    "checkpoint.save_interval_updates": 20,
    "dataset.validate_interval_updates": 60,
    "common.log_interval": 10,
}


def text_folder(session: Session) -> Path:
    """The folder with tokens/ for all splits and raw/ for the test set."""
    return session.out / "text"


def write_text(
    folder: Path, languages: Sequence[str], test: List[Pair], tokens: Iterable[Tuple[str, Pair]], console: Console
) -> None:
    """Write the raw test set to folder/raw, and `tokens`, (split, pair), to folder/tokens."""
    write_pairs(test, folder / "raw", "test", languages)
    (folder / "tokens").mkdir(exist_ok=True)
    sizes: Counter = Counter()
    with ExitStack() as stack:
        files = {}
        for split, pair in tokens:
            for language, sentence in zip(languages, pair):
                if (split, language) not in files:
                    path = folder / "tokens" / f"{split}.{language}"
                    files[split, language] = stack.enter_context(path.open("w", encoding="utf-8", newline="\n"))
                files[split, language].write(sentence + "\n")
            sizes[split] += 1
    for split in ("train", "valid", "test"):
        if not sizes[split]:
            raise ConfigurationError(f"the {split} split in {folder} is empty; provide more text")
    console.print(", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " pairs", highlight=False)


def prepare_pieces(
    session: Session, languages: Sequence[str], vocabulary: int, longest: float = math.inf, ratio: float = math.inf
) -> None:
    """Learn BPE on the training text of both languages, filter training and validation pairs by length, and binarise.

    longest, ratio: length limits of a pair in pieces, see corpus.clean.
    """
    text = text_folder(session)
    after = session.needs(text, "prepare")
    settings = {"text": after, "vocabulary": vocabulary, "longest": longest, "ratio": ratio}
    limits = "" if math.isinf(longest) else f", at most {longest} pieces per side, length ratio at most {ratio}"
    does = f"{vocabulary:,} sentencepiece BPE pieces{limits}"
    arguments = text / "tokens", languages, vocabulary, longest, ratio, 1 if session.options.smoke else session.options.workers
    session.step("data", session.data, settings, f"{does}; fairseq-preprocess", _make_data, *arguments)


def _make_data(
    tokens: Path, languages: Sequence[str], vocabulary: int, longest: float, ratio: float, workers: int,
    folder: Path, console: Console,
) -> None:  # fmt: skip
    long, pieces = folder / "all", folder / "pieces"
    long.mkdir(exist_ok=True)
    files = [tokens / f"train.{language}" for language in languages]
    sample = {"input_sentence_size": 5_000_000, "shuffle_input_sentence": True}  # more takes memory and changes little
    model = learn_pieces(files, pieces, vocabulary, "bpe", **sample)
    for split in ("train", "valid", "test"):
        for language in languages:
            segment_file(model, tokens / f"{split}.{language}", (pieces if split == "test" else long) / f"{split}.{language}")
    for split in ("train", "valid"):
        kept = write_pairs(clean(read_split(long, split, languages), longest, ratio), pieces, split, languages)
        console.print(f"{split}: {kept:,} pairs kept", highlight=False)
        if not kept:
            raise ConfigurationError(f"no {split} pair is within the length limits; are both sides of {tokens} the same text?")
    run_program(translation_command(pieces, folder / "bin", workers, languages), folder / "console.log", console)


def averaged(session: Session, count: int) -> Path:
    """The average of the run's last `count` checkpoints. If they change, a new average goes to a new folder."""
    last = checkpoint_of(session, "checkpoint_last.pt")
    does = f"averages the last {count} checkpoints of {session.run}"
    settings = {"count": count, "checkpoint": age(last)}
    folder = session.out / f"{session.run.name}-average-{fingerprint_of(settings)[:6]}"

    def write(folder: Path, console: Console) -> None:
        paths = last_checkpoints(session.run, count)
        console.print("averages " + ", ".join(path.name for path in paths), highlight=False)
        average([str(path) for path in paths], str(folder / "checkpoint.pt"))

    session.step("average", folder, settings, does, write)
    return folder / "checkpoint.pt"


def evaluate(session: Session, checkpoint: Path, languages: Sequence[str], search: List[str], lowercase: bool = False) -> None:
    """Translate the test set; report tokenised BLEU, and sacreBLEU of the detokenised text against the raw references."""
    text, target = text_folder(session), languages[1]
    test = session.out / f"{session.run.name}-test"
    command = translation.generate_command(session.data / "bin", str(USER_DIR), checkpoint, search, session.gpus == 0)
    raw = text / "raw" / f"test.{target}"
    translation.translate_step(session, test, command, {"command": command, "checkpoint": age(checkpoint)}, raw)
    if session.options.dry_run:
        return
    hypotheses = translation.read_sentences(test / translation.TRANSLATION)
    tokenised = translation.tokenised_bleu(hypotheses, translation.read_sentences(text / "tokens" / f"test.{target}"))
    detokenise = detokeniser(target)
    sentences = [detokenise(hypothesis) for hypothesis in hypotheses]
    detokenised = translation.sacre_bleu(sentences, translation.read_sentences(raw), lowercase=lowercase)
    session.results({**detokenised, **{f"tokenised_{name}": value for name, value in tokenised.items()}})
