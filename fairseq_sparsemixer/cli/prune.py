"""Remove experts from a checkpoint: those with the smallest load, or of least use to any language (after arXiv 2212.09811).

The load is that of a --moe-load-file of the model's training; --by language needs one with --moe-load-languages. IN may be
sharded, named as if it were one file; OUT is one file for any number of ranks, unless --expert-parallel-size is given. The
optimizer state is left out: it belongs to the larger model. With --data, both models translate, and the BLEU is shown; a
sharded IN is copied to a temporary file beside OUT for that.

examples:
  fairseq-sparsemixer prune run/checkpoint_best.pt small.pt --load run/load.jsonl --keep 0.5
  fairseq-sparsemixer prune run/checkpoint_best.pt de.pt --load run/load.jsonl --by language --languages de --keep 0.25 \\
      --uneven --data data-bin --generate-flags "--beam 4 --remove-bpe sentencepiece"
"""

import argparse
import os
import shlex
from pathlib import Path
from typing import List

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.cli.unused import refuse_unused
from fairseq_sparsemixer.errors import ConfigurationError

GENERATE_FLAGS = "--beam 4"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT, what to keep, and how to test."""
    parser.add_argument("source", metavar="IN", help="the checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write")
    parser.add_argument("--load", type=Path, required=True, metavar="FILE", help="the --moe-load-file of IN's training")
    keep = "experts to keep in each layer: a share such as 0.2, or a number such as 4"
    parser.add_argument("--keep", required=True, metavar="N", help=keep)
    by = "load: keep the experts with most tokens; language: those with the largest share of some language's tokens"
    parser.add_argument("--by", choices=("load", "language"), default="load", help=f"{by} (default: %(default)s)")
    only = "with --by language: the languages, or pairs, to keep experts for (default: all in the file)"
    parser.add_argument("--languages", nargs="+", metavar="LANGUAGE", help=only)
    uneven = "the same total, but layers keep as many as their scores are worth"
    parser.add_argument("--uneven", action="store_true", help=uneven)
    files = "files of OUT, one for each rank that shares the experts (default: %(default)s)"
    parser.add_argument("--expert-parallel-size", type=int, default=1, metavar="G", help=files)
    parser.add_argument("--data", metavar="DIR", help="binarised data: show the BLEU of IN and OUT on it")
    flags = f"with --data: further flags of fairseq-generate (default: '{GENERATE_FLAGS}')"
    parser.add_argument("--generate-flags", metavar="FLAGS", help=flags)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUT; print what is left, and the flags to train it with."""
    from fairseq_sparsemixer.plugin.checkpoints.pruning import parse_keep, prune
    from fairseq_sparsemixer.tools.pruning import as_one_file, bleu_of, expert_scores

    if options.by != "language":
        refuse_unused(options, "languages", "is only for --by language")
    if options.data is None:
        refuse_unused(options, "generate_flags", "is only for --data")
    if options.data and options.expert_parallel_size > 1:
        raise ConfigurationError("--data tests OUT as one file; leave out --expert-parallel-size, and reshard OUT afterwards")
    if options.data and not os.path.isdir(options.data.split(os.pathsep)[0]):
        raise ConfigurationError(f"--data {options.data} is not a folder; give the binarised data of fairseq-preprocess")
    if not options.load.is_file():
        raise ConfigurationError(f"--load {options.load} is not a file; give the --moe-load-file of {options.source}'s training")
    require_json(options.json, [options.source, options.target, str(options.load)])
    keep = parse_keep(options.keep)
    notes: List[str] = []
    scores = expert_scores(options.load, options.by, options.languages, notes)
    flags = _split(GENERATE_FLAGS if options.generate_flags is None else options.generate_flags)
    done = prune(options.source, options.target, scores, keep, options.uneven, options.expert_parallel_size)
    for layer, experts in done.kept.items():
        print(f"{layer}: {len(experts)} of {done.before[layer]} experts: {' '.join(map(str, experts))}")
    print(f"optimizer state left out: it belongs to the larger model; written: {', '.join(done.target)}")
    for note in notes:
        print(f"note: {note}")
    print(f"to fine-tune it (--finetune-from-model): {done.flags}")
    bleu = None
    if options.data:
        with as_one_file(options.source, options.target) as source:
            bleu = {"before": bleu_of(source, options.data, flags), "after": bleu_of(options.target, options.data, flags)}
        print(f"BLEU {bleu['before']:.2f} -> {bleu['after']:.2f}")
    if options.json:
        write_json(options.json, {**vars(done), "notes": notes, "bleu": bleu})


def _split(flags: str) -> List[str]:
    """The words of --generate-flags. Raises ConfigurationError for a quotation that does not end."""
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise ConfigurationError(f"--generate-flags {flags} cannot be split into words ({error}); close the quotation") from None
