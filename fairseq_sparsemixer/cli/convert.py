"""Convert a checkpoint of microsoft/SparseMixer's example, or of fairseq's branches moe and nllb, to one of ours.

SRC was written by the example's fairseq-train, with --router SparseMixer or SwitchGate, or is a set of files of one of the
branches: SRC-rank-N.pt and SRC-shared.pt, named as one file. DST computes the same. It works with fairseq-generate and, with
the printed flags, with fairseq-train --restore-file. The optimizer state of the example is kept if all experts made the same
number of updates, that of the branches is left out. docs/migration.md lists their flags beside ours.

example:
  fairseq-sparsemixer convert output-4/checkpoint_best.pt moe.pt
  fairseq-sparsemixer convert en_moe_lm_15b/model.pt lm.pt          # of model-rank-0.pt to model-rank-63.pt and model-shared.pt
  fairseq-generate DATA --user-dir "$(fairseq-sparsemixer user-dir)" --path moe.pt --beam 4 --lenpen 0.6
"""

import argparse

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.names import count_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST."""
    parser.add_argument("source", metavar="SRC", help="the checkpoint to convert; a set of files named as if it were one")
    parser.add_argument("target", metavar="DST", help="the checkpoint to write")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write DST; print whether the optimizer state was kept, what differs, and the flags to continue training with."""
    from fairseq_sparsemixer.plugin.checkpoints.branch_moe import convert_set, files_of_set
    from fairseq_sparsemixer.plugin.checkpoints.converting import convert
    from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
    from fairseq_sparsemixer.plugin.checkpoints.writing import require_targets, save_atomically

    files = files_of_set(options.source)
    sources = [options.source] if files is None else files.all()
    require_targets([options.target], sources)
    require_json(options.json, [*sources, options.target])
    with writing_checkpoints([options.target]):
        with one_sentence_for(options.source):
            done = convert(read_checkpoint(options.source)) if files is None else convert_set(files)
        save_atomically(done.state, options.target)
    experts, layers = done.options, count_layers(done.state["model"])
    print(f"{layers} layers of {experts.num_experts} experts, router {experts.router}: {options.target}")
    print(f"optimizer state left out: {done.left_out}" if done.left_out else "optimizer state kept")
    for note in done.notes:
        print(f"note: {note}")
    print(f"to continue training: {done.training_flags}, and the same model sizes")
    if options.json:
        figures = {"layers": layers, "num_experts": experts.num_experts, "router": experts.router, "notes": done.notes}
        write_json(options.json, {**figures, "optimizer_state": done.left_out is None, "left_out": done.left_out})
