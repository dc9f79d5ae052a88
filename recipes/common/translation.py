"""Translation of the test set and its scores, shared by the translation recipes."""

from pathlib import Path
from typing import Any, Dict, List, Optional

import sacrebleu
from rich.console import Console

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.generation import read_hypothesis, read_sentences
from recipes.common.progress import Advance, Meter, run_program, script
from recipes.common.session import Session

EVERY_SENTENCE = "--required-batch-size-multiple 1".split()  # with its default, 8, fairseq drops a split's last sentences
PROGRESS_STEP = 100  # translated sentences per progress line
TRANSLATION = "translation.txt"


def generate_command(binary: Path, user_dir: str, checkpoint: Path, search: List[str], on_cpu: bool) -> List[str]:
    """The fairseq-generate command for the test set, with pieces joined to words."""
    command = [script("fairseq-generate"), str(binary), "--user-dir", user_dir, *(["--cpu"] if on_cpu else [])]
    command += ["--path", str(checkpoint), *search, "--gen-subset", "test", "--max-tokens", "4096"]
    return [*command, "--post-process", "sentencepiece", *EVERY_SENTENCE]


def translate(command: List[str], total: int, folder: Path, console: Console) -> None:
    """Run fairseq-generate, and write the `total` translations to folder/translation.txt in the order of the test set."""
    sentences: Dict[int, str] = {}

    def read_line(line: str) -> Optional[Advance]:
        found = read_hypothesis(line)
        if found is None:
            return None
        number, sentences[number] = found
        return Advance(len(sentences), sentences[number]) if len(sentences) % PROGRESS_STEP == 0 else None

    run_program(command, folder / "console.log", console, Meter(total, "sentences", read_line))
    if len(sentences) != total:
        raise ConfigurationError(f"{len(sentences)} of {total} sentences were translated; see {folder / 'console.log'}")
    text = "".join(sentences[number] + "\n" for number in range(total))
    (folder / TRANSLATION).write_text(text, encoding="utf-8")


def sacre_bleu(hypotheses: List[str], references: List[str], **options: Any) -> Dict[str, Any]:
    """Corpus sacreBLEU: {"bleu", "signature"}. options: sacrebleu.BLEU's."""
    bleu = sacrebleu.BLEU(**options)
    score = bleu.corpus_score(hypotheses, [references]).score
    return {"bleu": score, "signature": str(bleu.get_signature())}


def tokenised_bleu(hypotheses: List[str], references: List[str]) -> Dict[str, Any]:
    """BLEU of tokenised text, unsmoothed like multi-bleu.perl and fairseq-score."""
    return sacre_bleu(hypotheses, references, tokenize="none", smooth_method="none", force=True)


def translate_step(session: Session, folder: Path, command: List[str], settings: Dict[str, Any], reference: Path) -> None:
    """`translate` as a step, for as many sentences as the reference has."""
    if session.options.dry_run:
        return session.command("translate the test set", folder, command, settings)
    total = len(read_sentences(reference))
    session.step("translate the test set", folder, settings, "", translate, command, total)
