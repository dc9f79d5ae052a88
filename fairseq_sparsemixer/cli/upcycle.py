"""Convert a dense fairseq transformer checkpoint to one with experts (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the dense feed-forward layer, so the new model computes the same as the dense one, unless --noise
makes the experts differ. OUT works with fairseq-generate, and for training with --finetune-from-model.

example:
  fairseq-sparsemixer upcycle dense.pt moe.pt --num-experts 8 --router sparsemixer
  fairseq-train DATA --user-dir "$(fairseq-sparsemixer user-dir)" --finetune-from-model moe.pt \\
      --arch transformer_moe --num-experts 8 --router sparsemixer ...
"""

import argparse
from dataclasses import fields

from fairseq_sparsemixer.cli.flags import add_flags
from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import count_layers
from fairseq_sparsemixer.options import MoEOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """DENSE OUT, the flags of a model with experts, and the noise."""
    parser.add_argument(
        "source",
        metavar="DENSE",
        help="a checkpoint of fairseq's transformer or transformer_lm, or one trained with --router dense",
    )
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write")
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="STD",
        help="standard deviation of noise added to each expert's weights, relative to their own",
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the noise and the router")
    add_flags(parser, MoEOptions)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUT, and print its layers, experts and size."""
    from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
    from fairseq_sparsemixer.plugin.checkpoints.upcycling import upcycle
    from fairseq_sparsemixer.plugin.checkpoints.writing import require_targets, save_atomically

    moe = MoEOptions(**{option.name: getattr(options, option.name) for option in fields(MoEOptions)})
    if not 0 <= options.seed < 2**63:
        raise ConfigurationError(f"--seed {options.seed} must be at least 0 and below 2**63")
    require_targets([options.target], [options.source])
    require_json(options.json, [options.source, options.target])
    with writing_checkpoints([options.target]):
        dense = read_checkpoint(options.source)
        with one_sentence_for(options.source):
            sparse = upcycle(dense, moe, options.noise, options.seed)
        save_atomically(sparse, options.target)
    counts = [sum(value.numel() for value in state["model"].values()) for state in (dense, sparse)]
    layers = count_layers(sparse["model"])
    print(f"{layers} layers of {moe.num_experts} experts, {counts[0]:,} -> {counts[1]:,} values: {options.target}")
    if options.json:
        write_json(options.json, {"layers": layers, "num_experts": moe.num_experts, "dense": counts[0], "sparse": counts[1]})
