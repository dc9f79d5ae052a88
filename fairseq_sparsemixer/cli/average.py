"""Average the weights of checkpoints, or take the moving average that fairseq-train --store-ema keeps.

The mean of a run's last checkpoints often translates better than the last one alone (arXiv 1706.03762, section 6.1). OUT has
the settings of the newest IN and no optimizer state. IN and OUT name a sharded checkpoint as if it were one file:
checkpoint_last.pt for checkpoint_last-rank-0.pt, checkpoint_last-rank-1.pt and so on.

examples:
  fairseq-sparsemixer average run/checkpoint1[0-4].pt average.pt
  fairseq-sparsemixer average --ema run/checkpoint_last.pt ema.pt
"""

import argparse

from fairseq_sparsemixer.cli.json_file import require_json, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN ... OUT, and which weights."""
    parser.add_argument("sources", metavar="IN", nargs="+", help="the checkpoints to read, of one model")
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write, which must not exist")
    parser.add_argument("--ema", action="store_true", help="take the EMA weights of each IN, written by --store-ema")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUT, and print what was averaged."""
    from fairseq_sparsemixer.plugin.checkpoints.averaging import average, require_new

    require_json(options.json, [*options.sources, options.target])
    require_new(options.target)
    done = average(options.sources, options.target, options.ema)
    print(
        f"mean of the {'EMA ' if done.ema else ''}weights of {len(done.source)} checkpoints, newest {done.source[-1]},"
        f" {done.values:,} values: {', '.join(done.target)}"
    )
    print("optimizer state left out: it belongs to none of these weights")
    if options.json:
        write_json(options.json, vars(done))
