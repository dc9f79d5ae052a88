"""What `prune` needs beside the checkpoint: the experts' scores from load files, and the BLEU of a checkpoint."""

import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import WRAPPERS
from fairseq_sparsemixer.tools import programs
from fairseq_sparsemixer.tools.generation import read_hypothesis
from fairseq_sparsemixer.tools.language_table import UNTAGGED
from fairseq_sparsemixer.tools.runs import ExpertLoad, read_load
from fairseq_sparsemixer.tools.study.commands import USER_DIR

TARGET = re.compile(r"T-(\d+)\t(.*)")  # of fairseq-generate: number, reference


def expert_scores(
    path: Path, by: str, languages: Optional[Sequence[str]] = None, notes: Optional[List[str]] = None
) -> Dict[str, List[float]]:
    """[E] by layer, from a --moe-load-file: each expert's share of the tokens, or its largest share of a language's tokens.

    by: load or language. languages: only these; None for all. Sentences without a language token are of no language; notes
    gets a sentence about them. Raises ConfigurationError for a file without languages.
    """
    load = read_load(path)
    if load is None:
        raise ConfigurationError(f"{path} has no line of a load file; train longer, or with a smaller --moe-load-interval")
    rows = load.total() if by == "load" else _largest_shares(path, load, languages, [] if notes is None else notes)
    # older versions wrote wrapped names on several ranks
    return {WRAPPERS.sub("", layer): row for layer, row in zip(load.layers, rows)}


def _largest_shares(path: Path, load: ExpertLoad, languages: Optional[Sequence[str]], notes: List[str]) -> List[List[float]]:
    table = load.languages
    named = [] if table is None else [name for name in table.languages if name != UNTAGGED]
    if table is None or not named:
        raise ConfigurationError(f"{path} has no languages; train with --moe-load-languages, or use --by load")
    unknown = sorted(set(languages or ()) - set(named))
    if unknown:
        raise ConfigurationError(f"--languages {unknown[0]} is not in {path}; it has {', '.join(named)}")
    chosen = [index for index, name in enumerate(table.languages) if name in (languages or named)]
    if UNTAGGED in table.languages:
        row = table.languages.index(UNTAGGED)
        share = sum(sum(rows[row]) for rows in table.counts) / max(sum(sum(map(sum, rows)) for rows in table.counts), 1)
        notes.append(f"{100 * share:.1f} % of the tokens in {path} are of sentences without a language token, and do not count")
    return [[max(column) for column in zip(*(rows[index] for index in chosen))] for rows in table.shares()]


@contextmanager
def as_one_file(checkpoint: str, target: str) -> Iterator[str]:
    """The path of a checkpoint that fairseq-generate can read: a sharded one is copied to a temporary file beside `target`."""
    from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard  # loads torch

    if os.path.exists(checkpoint):
        yield checkpoint
        return
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(target)), prefix=".prune-") as folder:
        whole = os.path.join(folder, "whole.pt")
        reshard(checkpoint, whole, 1, with_optimizer=False)
        yield whole


def bleu_of(checkpoint: str, data: str, flags: Sequence[str]) -> float:
    """sacreBLEU of fairseq-generate's translations against the references of the data. Raises ConfigurationError."""
    import torch
    from sacrebleu.metrics import BLEU

    own = [] if torch.cuda.is_available() else ["--cpu"]
    command = [sys.executable, "-m", "fairseq_cli.generate", data, "--user-dir", USER_DIR, "--path", checkpoint, *own, *flags]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "generate.txt")
        try:
            programs.run(command, log)
        except programs.ProgramFailed as error:
            raise ConfigurationError(f"{checkpoint} could not be tested on {data}: {error.reason}") from None
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    hypotheses = dict(filter(None, map(read_hypothesis, lines)))
    references = {int(match[1]): match[2] for match in map(TARGET.fullmatch, lines) if match}
    if not references or references.keys() != hypotheses.keys():
        raise ConfigurationError(f"{data} has no references to test with; give a --data with both languages")
    numbers = sorted(references)
    return float(BLEU().corpus_score([hypotheses[n] for n in numbers], [[references[n] for n in numbers]]).score)
