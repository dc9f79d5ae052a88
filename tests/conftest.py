"""Shared fixtures: the repository's root, real text if available, and tiny fairseq tasks, models and data."""

import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)  # for subprocesses

for found in sorted(ROOT.parent.glob("*/data/multi30k")):  # real text in a folder next to the repository
    os.environ.setdefault("SPARSEMIXER_DATA", str(found.parent))

# a busy machine must not fail a test
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

torch.set_num_threads(1)  # tensors here are tiny, so more threads only add overhead


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder $SPARSEMIXER_DATA with multi30k/ and wikitext2/; skips the test if it does not exist."""
    path = Path(os.environ.get("SPARSEMIXER_DATA", "nowhere"))
    if not path.is_dir():
        pytest.skip("no real text; set SPARSEMIXER_DATA to a folder with multi30k/ and wikitext2/")
    return path


@pytest.fixture(scope="session")
def dictionary():
    """A fairseq Dictionary of 20 words: w0 to w19."""
    from fairseq.data import Dictionary

    words = Dictionary()
    for index in range(20):
        words.add_symbol(f"w{index}")
    return words


@pytest.fixture(scope="session")
def translation_task(dictionary):
    """fairseq's translation task between two copies of the dictionary, without data."""
    from fairseq.tasks.translation import TranslationConfig, TranslationTask

    return TranslationTask(TranslationConfig(), dictionary, dictionary)


@pytest.fixture
def build_translation_model(translation_task):
    """build(**flags) -> a transformer_moe model with two layers per stack and width 16, e.g. build(router="switch")."""
    from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEModel, tiny

    def build(**flags):
        small = dict(
            encoder_layers=2, decoder_layers=2, encoder_embed_dim=16, encoder_ffn_embed_dim=32, encoder_attention_heads=2
        )
        args = Namespace(**{**small, "num_experts": 4, "dropout": 0.0, **flags})
        args.decoder_embed_dim, args.decoder_ffn_embed_dim = args.encoder_embed_dim, args.encoder_ffn_embed_dim
        args.decoder_attention_heads = args.encoder_attention_heads
        tiny(args)
        return TransformerMoEModel.build_model(args, translation_task)

    return build


@pytest.fixture
def translation_batch(dictionary):
    """batch(lengths) -> a sample as collated by fairseq's translation task: random words, sentences of the given lengths."""
    from fairseq.data.language_pair_dataset import collate

    def batch(*lengths: int):
        def sentence(length: int):
            words = torch.randint(dictionary.nspecial, len(dictionary), (length,))
            return torch.cat([words, words.new_tensor([dictionary.eos()])])

        samples = [{"id": i, "source": sentence(n), "target": sentence(n)} for i, n in enumerate(lengths)]
        return collate(samples, dictionary.pad(), dictionary.eos(), input_feeding=True)

    return batch


@pytest.fixture(scope="session")
def language_modeling_task(dictionary):
    """fairseq's language_modeling task without data."""
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    return LanguageModelingTask(LanguageModelingConfig(tokens_per_sample=32), dictionary)


@pytest.fixture
def language_modeling_batch(dictionary):
    """batch(lengths) -> a sample as collated by fairseq's language_modeling task: random words, padded on the right."""

    def batch(*lengths: int):
        source = torch.full((len(lengths), max(lengths)), dictionary.pad())
        target = source.clone()
        for row, length in enumerate(lengths):
            words = torch.randint(dictionary.nspecial, len(dictionary), (length + 1,))
            source[row, :length], target[row, :length] = words[:-1], words[1:]
        return {"net_input": {"src_tokens": source}, "target": target, "ntokens": sum(lengths), "id": torch.arange(len(lengths))}

    return batch


@pytest.fixture(scope="session")
def masked_lm_task(dictionary):
    """fairseq's masked_lm task without data; its dictionary also has <mask>."""
    from copy import deepcopy

    from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask

    return MaskedLMTask(MaskedLMConfig(tokens_per_sample=32), deepcopy(dictionary))


@pytest.fixture
def masked_lm_batch(masked_lm_task):
    """batch(lengths) -> a sample as collated by fairseq's masked_lm task: random words, every third one masked."""

    def batch(*lengths: int):
        words = masked_lm_task.dictionary
        tokens = torch.full((len(lengths), max(lengths)), words.pad())
        for row, length in zip(tokens, lengths):
            row[:length] = torch.randint(words.nspecial, len(words) - 1, (length,))
        masked = tokens.ne(words.pad()) & (torch.arange(tokens.size(1)) % 3 == 1)
        return {
            "net_input": {"src_tokens": tokens.masked_fill(masked, masked_lm_task.mask_idx)},
            "target": tokens.masked_fill(~masked, words.pad()),
            "ntokens": sum(lengths),
            "nsentences": len(lengths),
            "id": torch.arange(len(lengths)),
        }

    return batch


@pytest.fixture(scope="session")
def run_fairseq():
    """run("train", argument, ...) -> the result of a fairseq command, run in this process; needs no --user-dir."""
    from importlib import import_module

    from fairseq import checkpoint_utils, options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_sparsemixer  # noqa: F401

    parsers = {
        "train": options.get_training_parser,
        "generate": options.get_generation_parser,
        "interactive": options.get_interactive_generation_parser,
        "eval_lm": options.get_eval_lm_parser,
        "preprocess": options.get_preprocessing_parser,
        "validate": options.get_validation_parser,
    }

    def run(command: str, *arguments):
        main = import_module(f"fairseq_cli.{command}").main
        checkpoint_utils.save_checkpoint.__dict__.pop("best", None)  # fairseq expects to train once per process
        parser, arguments = parsers[command](), [str(argument) for argument in arguments]
        if command == "preprocess":
            return main(parser.parse_args(arguments))
        return main(convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments)))

    return run


@pytest.fixture(scope="session")
def wikitext(shared_data, run_fairseq, tmp_path_factory) -> Path:
    """Binarised WikiText-2: `train` is its test.txt, `valid` the first fifth of its valid.txt."""
    folder = tmp_path_factory.mktemp("wikitext")
    for split, source, share in (("train", "test.txt", 1), ("valid", "valid.txt", 5)):
        lines = [line.strip() for line in (shared_data / "wikitext2" / source).read_text(encoding="utf-8").splitlines()]
        lines = [line for line in lines if line]
        (folder / f"{split}.txt").write_text("\n".join(lines[: len(lines) // share]) + "\n", encoding="utf-8")
    run_fairseq(
        "preprocess", "--only-source", "--trainpref", folder / "train.txt", "--validpref", folder / "valid.txt",
        "--destdir", folder / "bin", "--thresholdsrc", 10, "--workers", 1,
    )  # fmt: skip
    return folder / "bin"


@pytest.fixture(scope="session")
def translation_data(dictionary, tmp_path_factory) -> Path:
    """A folder of binarised German-English data: 48 pairs for training and 8 for validation; targets equal sources."""
    from fairseq.data import indexed_dataset

    folder = tmp_path_factory.mktemp("translation")
    generator = torch.Generator().manual_seed(1)
    for language in ("de", "en"):
        dictionary.save(str(folder / f"dict.{language}.txt"))
    for part, count in (("train", 48), ("valid", 8)):
        builders = {
            language: indexed_dataset.make_builder(str(folder / f"{part}.de-en.{language}.bin"), "mmap", len(dictionary))
            for language in ("de", "en")
        }
        for _ in range(count):
            length = torch.randint(2, 9, (1,), generator=generator).item()
            words = torch.randint(dictionary.nspecial, len(dictionary), (length,), generator=generator)
            for builder in builders.values():
                builder.add_item(torch.cat([words, words.new_tensor([dictionary.eos()])]).int())
        for language, builder in builders.items():
            builder.finalize(str(folder / f"{part}.de-en.{language}.idx"))
    return folder


@pytest.fixture
def train(run_fairseq, translation_data, tmp_path, caplog):
    """train(flag, ...) -> fairseq-train's log, a list of {name: figure} for each tag ("train_inner", "train", "valid").

    A tiny SparseMixer model on translation_data, unless overridden by flags; one log line per update.
    """
    import json
    import logging

    from fairseq_sparsemixer import __file__ as package

    small = (
        "--arch transformer_moe_tiny --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-embed-dim 16"
        " --decoder-ffn-embed-dim 32 --num-experts 4 --optimizer adam --lr 0.01 --max-tokens 100 --cpu --num-workers 0"
        " --log-format json --log-interval 1 --no-epoch-checkpoints --criterion moe_label_smoothed_cross_entropy"
    ).split()

    def run(*flags, data: Path = translation_data):
        caplog.set_level(logging.INFO)
        caplog.clear()
        save = () if "--no-save" in flags or "--save-dir" in flags else ("--save-dir", tmp_path / "run")
        run_fairseq("train", data, "--user-dir", Path(package).parent, *small, *save, *flags)
        logs = {}
        for record in caplog.records:
            if record.name in ("train_inner", "train", "valid"):
                figures = {name: float(value) for name, value in json.loads(record.message).items()}
                logs.setdefault(record.name, []).append(figures)
        return logs

    return run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Binarised translation data of random words, for runs of fairseq's commands (see runs.py)."""
    import runs

    return runs.make_corpus(tmp_path_factory.mktemp("corpus"))
