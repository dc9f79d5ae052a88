"""Convert a checkpoint of microsoft/SparseMixer's example, or of fairseq's branches moe and nllb, to one of ours.

SRC was written by the example's fairseq-train, with --router SparseMixer or SwitchGate, or is a set of files of one of the
branches: SRC-rank-N.pt and SRC-shared.pt, named as one file. DST computes the same. It works with fairseq-generate and, with
the printed flags, with fairseq-train --restore-file. The optimizer state of the example is kept if all experts made the same
number of updates, that of the branches is left out. docs/migration.md lists their flags beside ours.

With --dict, SRC is a checkpoint of ours or of fairseq, and DST the same model on another dictionary: embeddings and output
rows of words that both have are kept, those of new words are initialised as fairseq does. The optimizer state is left out.

With --merge-lora, SRC is a checkpoint of ours whose experts have adapters (--expert-lora-rank), one file or sharded, and DST
the same function with plain experts. The optimizer state is left out.

examples:
  fairseq-sparsemixer convert output-4/checkpoint_best.pt moe.pt
  fairseq-sparsemixer convert en_moe_lm_15b/model.pt lm.pt          # of model-rank-0.pt to model-rank-63.pt and model-shared.pt
  fairseq-generate DATA --user-dir "$(fairseq-sparsemixer user-dir)" --path moe.pt --beam 4 --lenpen 0.6
  fairseq-sparsemixer convert run/checkpoint_best.pt moved.pt --dict new-data/dict.en.txt
  fairseq-sparsemixer convert --merge-lora lora/checkpoint_best.pt merged.pt
"""

import argparse

from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.cli.unused import refuse_unused
from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import count_layers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SRC DST."""
    parser.add_argument("source", metavar="SRC", help="the checkpoint to convert; a set of files named as if it were one")
    parser.add_argument("target", metavar="DST", help="the checkpoint to write")
    parser.add_argument("--merge-lora", action="store_true", help="add the adapters of SRC's experts to their weights")
    words = parser.add_argument_group("another dictionary")
    words.add_argument("--dict", metavar="NEW", help="the new dictionary (dict.txt), of both sides of a translation")
    words.add_argument("--source-dict", metavar="NEW", help="that of the source alone")
    words.add_argument("--target-dict", metavar="NEW", help="that of the target alone")
    words.add_argument(
        "--data", metavar="FOLDER", help="the data SRC was trained on, with its dictionary (default: the folder named in SRC)"
    )
    words.add_argument("--seed", type=int, help="seed of the rows of new words (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write DST, and print what was kept and what differs."""
    if options.merge_lora:
        _merge(options)
        return
    if options.dict is None and options.source_dict is None and options.target_dict is None:
        refuse_unused(options, "data seed", "is only for --dict, --source-dict and --target-dict")
        _convert(options)
    else:
        _move(options)


def _convert(options: argparse.Namespace) -> None:
    """Convert a checkpoint of another program; print whether the optimizer state was kept, what differs, and training flags."""
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
            done = convert(read_checkpoint(options.source, of_branch=True)) if files is None else convert_set(files)
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


def _merge(options: argparse.Namespace) -> None:
    """Adapters into weights: print how many."""
    from fairseq_sparsemixer.plugin.checkpoints.merging import merge_lora

    refuse_unused(options, "dict source_dict target_dict data seed", "is not for --merge-lora")
    require_json(options.json, [options.source, options.target])
    count = merge_lora(options.source, options.target)
    print(f"{count} weights of experts with their adapters merged: {options.target}")
    print("optimizer state left out; to continue training: --finetune-from-model")
    if options.json:
        write_json(options.json, {"merged": count})


def _move(options: argparse.Namespace) -> None:
    """Another dictionary: print the words kept, new and lost of each side."""
    from fairseq_sparsemixer.plugin.checkpoints.folder_lock import writing_checkpoints
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
    from fairseq_sparsemixer.plugin.checkpoints.vocabulary import move, plan_moves
    from fairseq_sparsemixer.plugin.checkpoints.writing import require_targets, save_atomically

    seed = 1 if options.seed is None else options.seed
    if not 0 <= seed < 2**63:
        raise ConfigurationError(f"--seed {seed} must be at least 0 and below 2**63")
    files = [options.source, *filter(None, (options.dict, options.source_dict, options.target_dict))]
    require_targets([options.target], files)
    require_json(options.json, [*files, options.target])
    with writing_checkpoints([options.target]):
        state = read_checkpoint(options.source)
        with one_sentence_for(options.source):
            moves = plan_moves(state, options.dict, options.source_dict, options.target_dict, options.data)
            done = move(state, moves, seed)
        save_atomically(done.state, options.target)
    for side, words in done.words.items():
        named = f"{side}: " if len(done.words) > 1 else ""
        print(f"{named}{words['kept']:,} words kept, {words['new']:,} new, {words['lost']:,} left out: {options.target}")
    for note in done.notes:
        print(f"note: {note}")
    print("optimizer state left out; to continue training: --finetune-from-model")
    if options.json:
        write_json(options.json, {"words": done.words, "notes": done.notes})
