"""Convert a dense fairseq transformer checkpoint to one with experts (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the dense feed-forward layer, so the new model computes the same as the dense one, unless --noise or
--reinitialise makes the experts differ. With --granularity, experts are slices of the layer (arXiv 2410.07524). A checkpoint
that has experts gets another number of them, and keeps its router. OUT works with fairseq-generate, and for training with
--finetune-from-model.

examples:
  fairseq-sparsemixer upcycle dense.pt moe.pt --num-experts 8 --router sparsemixer
  fairseq-sparsemixer upcycle dense.pt fine.pt --num-experts 64 --granularity 8 --router topk --moe-top-k 8
  fairseq-sparsemixer upcycle moe.pt wide.pt --num-experts 16
  fairseq-train DATA --user-dir "$(fairseq-sparsemixer user-dir)" --finetune-from-model moe.pt \\
      --arch transformer_moe --num-experts 8 --router sparsemixer ...
"""

import argparse
from dataclasses import fields
from typing import List

from fairseq_sparsemixer.cli.flags import add_flags
from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS, FIRST_WEIGHT, count_layers
from fairseq_sparsemixer.options import MoEOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT, the flags of a model with experts, and the noise."""
    parser.add_argument(
        "source",
        metavar="IN",
        help="a checkpoint of fairseq's transformer or transformer_lm, one trained with --router dense, or one with experts",
    )
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="standard deviation of noise added to each expert's weights, relative to their own",
    )
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="cut the dense layer into G slices; each expert is one of them, and a token needs --moe-top-k of a multiple of G",
    )
    parser.add_argument(
        "--reinitialise",
        type=float,
        default=0.0,
        metavar="R",
        help="share of each expert's hidden units that is drawn anew, such as 0.5 (drop-upcycling, arXiv 2502.19261)",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise, the units drawn anew and the router")
    add_flags(parser, MoEOptions)
    parser.set_defaults(**{option.name: None for option in fields(MoEOptions)})  # not given: the checkpoint's, or the default
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUT, and print its layers, experts and size."""
    from fairseq_sparsemixer.plugin.checkpoints.expert_count import Changed, change_experts, options_of
    from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
    from fairseq_sparsemixer.plugin.checkpoints.slices import Change
    from fairseq_sparsemixer.plugin.checkpoints.upcycling import upcycle
    from fairseq_sparsemixer.plugin.checkpoints.writing import require_targets, save_atomically

    flags = {option.name: getattr(options, option.name) for option in fields(MoEOptions)}
    given = {name: value for name, value in flags.items() if value is not None}
    named = frozenset(given)
    if not 0 <= options.seed < 2**63:
        raise ConfigurationError(f"--seed {options.seed} must be at least 0 and below 2**63")
    change = Change(options.noise, options.seed, options.granularity, options.reinitialise)
    require_targets([options.target], [options.source])
    require_json(options.json, [options.source, options.target])
    with writing_checkpoints([options.target]):
        source = read_checkpoint(options.source)
        with one_sentence_for(options.source):
            has_experts = any(EXPERTS in name for name in source["model"])
            if options.num_experts is None and has_experts:
                given["num_experts"] = options_of(source).num_experts
            moe = MoEOptions(**given)
            notes: List[str] = []
            done = (
                change_experts(source, moe, change, named) if has_experts else Changed(upcycle(source, moe, change, notes), notes)
            )
        save_atomically(done.state, options.target)
    counts = [sum(value.numel() for value in state["model"].values()) for state in (source, done.state)]
    layers = count_layers(done.state["model"])
    numbers = sorted({value.size(0) for name, value in done.state["model"].items() if name.endswith(FIRST_WEIGHT)})
    experts = " or ".join(map(str, numbers))
    print(f"{layers} layers of {experts} experts, {counts[0]:,} -> {counts[1]:,} values: {options.target}")
    for note in done.notes:
        print(f"note: {note}")
    if options.json:
        figures = {"layers": layers, "num_experts": moe.num_experts, "dense": counts[0], "sparse": counts[1]}
        write_json(options.json, {**figures, "notes": done.notes})
