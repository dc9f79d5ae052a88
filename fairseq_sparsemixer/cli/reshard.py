"""Convert a checkpoint between one file and one file per rank, for any number of ranks that share the experts.

IN and OUT name a sharded checkpoint as if it were one file: checkpoint_last.pt for checkpoint_last-rank-0.pt,
checkpoint_last-rank-1.pt and so on. All tensors, including the optimizer state, are kept bit for bit.

examples:
  fairseq-sparsemixer reshard run/checkpoint_last.pt whole.pt --portable
  fairseq-sparsemixer reshard whole.pt wide/checkpoint_last.pt --expert-parallel-size 8
"""

import argparse
import os

from fairseq_sparsemixer.cli.json_file import require_json, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUT and the layout of OUT."""
    parser.add_argument("source", metavar="IN", help="the checkpoint to read")
    parser.add_argument("target", metavar="OUT", help="the checkpoint to write")
    layout = parser.add_mutually_exclusive_group(required=True)
    layout.add_argument("--expert-parallel-size", type=int, metavar="G", help="ranks that will share the experts, one file each")
    layout.add_argument(
        "--portable", action="store_const", const=1, dest="expert_parallel_size", help="one file, for any number of ranks"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUT, and print what was written."""
    from fairseq_sparsemixer.plugin.checkpoints.resharding import reshard

    require_json(options.json, [options.source, options.target])
    done = reshard(options.source, options.target, options.expert_parallel_size)
    size = sum(os.path.getsize(path) for path in done.target)
    print(
        f"{len(done.source)} -> {len(done.target)} files, {done.num_experts} experts, {size / 2**20:,.1f} MiB,"
        f" optimizer state {'kept' if done.optimizer_state else 'absent'}: {', '.join(done.target)}"
    )
    if options.json:
        write_json(options.json, {**vars(done), "bytes": size})
