"""Convert a checkpoint of microsoft/SparseMixer's fairseq example to one of transformer_moe that computes the same.

SRC was written by the example's fairseq-train, with --router SparseMixer or SwitchGate. DST works with fairseq-generate and,
with the printed flags, with fairseq-train --restore-file. The optimizer state is kept if all experts made the same number of
updates. docs/migration.md lists the example's flags beside ours.

example:
  fairseq-sparsemixer convert output-4/checkpoint_best.pt moe.pt
  fairseq-generate DATA --user-dir "$(fairseq-sparsemixer user-dir)" --path moe.pt --beam 4 --lenpen 0.6
"""

import argparse

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.names import count_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint written by microsoft/SparseMixer's example")
    parser.add_argument("target", metavar="DST", help="the checkpoint to write")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write DST; print whether the optimizer state was kept, and the flags to continue training with."""
    from fairseq_sparsemixer.plugin.checkpoints.converting import convert
    from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
    from fairseq_sparsemixer.plugin.checkpoints.writing import require_targets, save_atomically

    require_targets([options.target], [options.source])
    require_json(options.json, [options.source, options.target])
    with writing_checkpoints([options.target]):
        theirs = read_checkpoint(options.source)
        with one_sentence_for(options.source):
            done = convert(theirs)
        save_atomically(done.state, options.target)
    experts, layers = done.options, count_layers(done.state["model"])
    print(f"{layers} layers of {experts.num_experts} experts, router {experts.router}: {options.target}")
    print(f"optimizer state left out: {done.left_out}" if done.left_out else "optimizer state kept")
    print(
        f"to continue training: --arch transformer_moe --router {experts.router} --num-experts {experts.num_experts}"
        f" --moe-freq {experts.moe_freq} --jitter-eps {experts.jitter_eps:g} --router-bias, and the same model sizes"
    )
    if options.json:
        figures = {"layers": layers, "num_experts": experts.num_experts, "router": experts.router}
        write_json(options.json, {**figures, "optimizer_state": done.left_out is None, "left_out": done.left_out})
