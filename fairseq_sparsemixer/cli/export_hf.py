"""Export a checkpoint to a folder that Hugging Face's transformers loads.

OUTDIR gets config.json, generation_config.json and the weights as safetensors, and with --sentencepiece-model a tokenizer.
What transformers has no counterpart of is refused by the name of its flag. docs/checkpoints.md lists what fits.

examples:
  fairseq-sparsemixer export-hf run/checkpoint_best.pt hf
  fairseq-sparsemixer export-hf run/checkpoint_best.pt hf --sentencepiece-model spm.model --dict DATA/dict.en.txt --beam 4
"""

import argparse
import os

from fairseq_sparsemixer.cli.folder import folder
from fairseq_sparsemixer.cli.json_file import require_json, write_json
from fairseq_sparsemixer.cli.unused import refuse_unused
from fairseq_sparsemixer.errors import ConfigurationError

DECODING = ("beam", "lenpen", "max_len_b")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """IN OUTDIR, the tokenizer's files, the defaults of decoding, and how the files are written."""
    parser.add_argument("source", metavar="IN", help="the checkpoint to export")
    parser.add_argument("target", metavar="OUTDIR", type=folder, help="the folder to write")
    text = parser.add_argument_group("tokenizer")
    text.add_argument(
        "--sentencepiece-model", metavar="FILE", help="the model that split the training text (default: no tokenizer)"
    )
    text.add_argument("--dict", metavar="FILE", help="the dictionary of fairseq-preprocess, dict.LANG.txt")
    text.add_argument("--target-sentencepiece-model", metavar="FILE", help="that of the target language (default: the same)")
    text.add_argument("--target-dict", metavar="FILE", help="that of the target language (default: the same)")
    decoding = parser.add_argument_group("defaults of generate(), as flags of fairseq-generate")
    decoding.add_argument("--beam", type=int, metavar="N", help="beam size (default: 5)")
    decoding.add_argument("--lenpen", type=float, metavar="P", help="length penalty (default: 1)")
    decoding.add_argument("--max-len-b", type=int, metavar="N", help="most words of an output (default: 200)")
    parser.add_argument(
        "--dense-as-experts",
        action="store_true",
        help="copy dense layers into equal experts where NllbMoe has experts in every N-th layer and the model does not",
    )
    parser.add_argument("--max-file-size", type=float, default=5.0, metavar="GB", help="of a file with weights (default: 5)")
    parser.add_argument("--overwrite", action="store_true", help="replace the export in OUTDIR")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")


def run(options: argparse.Namespace) -> None:
    """Write OUTDIR, and print what it holds."""
    import safetensors  # noqa: F401  # before any work is done

    from fairseq_sparsemixer.moe.gates import DENSE
    from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for
    from fairseq_sparsemixer.tools.export.exporting import TRANSLATION, export
    from fairseq_sparsemixer.tools.export.folder import GB, require_folder, write_folder
    from fairseq_sparsemixer.tools.export.generation import Decoding
    from fairseq_sparsemixer.tools.export.source import read_source

    _require_tokenizer(options)
    if not 0 < options.max_file_size < float("inf"):
        raise ConfigurationError(f"--max-file-size {options.max_file_size} must be positive and finite")
    given = {name: getattr(options, name) for name in DECODING if getattr(options, name) is not None}
    decoding = Decoding(**given)
    require_folder(options.target, options.overwrite)
    require_json(options.json, [options.source])
    source = read_source(options.source)
    if source.kind not in TRANSLATION:
        refuse_unused(options, " ".join(DECODING), f"is for translation models, and {options.source} is of {source.kind}")
    if source.router == DENSE:
        refuse_unused(options, "dense_as_experts", f"is for models with experts, and {options.source} has none")
    with one_sentence_for(options.source):
        result = export(source, decoding, options.dense_as_experts)
    files = write_folder(options.target, result, _tokenizer(options, result, source), int(options.max_file_size * GB))
    size = sum(os.path.getsize(options.target / name) for name in files)
    values = sum(lazy.values for lazy in result.tensors.values())
    print(f"{result.model}, {values:,} values, {len(files)} file(s) of {size / 2**20:,.1f} MiB: {options.target}")
    if result.model.startswith("FSMT"):
        print("note: generate() of FSMT in transformers 4.57 is wrong; docs/checkpoints.md has the lines that mend it")
    if options.json:
        write_json(options.json, {"model": result.model, "values": values, "files": files, "bytes": size})


def _require_tokenizer(options: argparse.Namespace) -> None:
    """Raise ConfigurationError for files of a tokenizer that lack another."""
    given = {name: getattr(options, name) for name in ("dict", "target_dict", "target_sentencepiece_model")}
    if options.sentencepiece_model is None:
        for name, value in given.items():
            if value is not None:
                raise ConfigurationError(f"--{name.replace('_', '-')} {value} needs --sentencepiece-model; give both, or neither")
    elif options.dict is None:
        raise ConfigurationError(
            f"--sentencepiece-model {options.sentencepiece_model} needs --dict, the dict.LANG.txt of the data"
        )


def _tokenizer(options: argparse.Namespace, result, source) -> dict:
    if options.sentencepiece_model is None:
        return {}
    from fairseq_sparsemixer.tools.export.tokenizer import Texts, tokenizer_files

    other = Texts(
        options.target_sentencepiece_model or options.sentencepiece_model,
        options.target_dict or options.dict,
    )
    return tokenizer_files(result, source, Texts(options.sentencepiece_model, options.dict), other)
