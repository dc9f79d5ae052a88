"""`generate` of transformers decodes as fairseq-generate does: the same tokens for 100 sentences of Multi30k."""

import gzip
from itertools import islice
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary

from fairseq_sparsemixer import __file__ as package
from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.tools.export.generation import Decoding, generation_config
from recipes.common.segmentation import learn_pieces, segment

SENTENCES, COMPARED, LIMIT = 112, 100, 200  # some outputs of a model that has hardly learnt reach the limit of their length
DECODING = "--beam 4 --lenpen 0.7".split()
TRAIN = (
    "--arch transformer_moe_tiny --encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 64 --decoder-embed-dim 64"
    " --encoder-ffn-embed-dim 128 --decoder-ffn-embed-dim 128 --encoder-attention-heads 4 --decoder-attention-heads 4"
    " --encoder-normalize-before --decoder-normalize-before --share-all-embeddings --router gshard --num-experts 4 --moe-freq 1"
    " --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 --dropout 0 --optimizer adam --lr 5e-3"
    " --lr-scheduler inverse_sqrt --warmup-updates 40 --clip-norm 1.0 --max-tokens 1500 --max-update 260 --seed 1 --num-workers 0"
    " --no-epoch-checkpoints --disable-validation --cpu --no-progress-bar"
).split()


def test_the_length_limit_counts_both_ends_and_the_models_positions():
    assert generation_config(Decoding(), 1024)["max_length"] == 202
    assert generation_config(Decoding(), 64)["max_length"] == 65


@pytest.fixture(scope="module")
def trained(shared_data, run_fairseq, tmp_path_factory) -> Path:
    """A folder with pieces.model, data and a model trained for 260 updates on 4,000 pairs."""
    folder = tmp_path_factory.mktemp("multi30k")
    for part, name, count in (("train", "train", 4000), ("test", "test_2016_flickr", SENTENCES)):
        for language in ("de", "en"):
            with gzip.open(shared_data / "multi30k" / f"{name}.{language}.gz", "rt", encoding="utf-8") as lines:
                (folder / f"{part}.raw.{language}").write_text("".join(islice(lines, count)), encoding="utf-8")
    pieces = learn_pieces([folder / "train.raw.de", folder / "train.raw.en"], folder, 1500)
    for part in ("train", "test"):
        for language in ("de", "en"):
            lines = (folder / f"{part}.raw.{language}").read_text(encoding="utf-8").splitlines()
            (folder / f"{part}.{language}").write_text("\n".join(segment(pieces, lines)) + "\n", encoding="utf-8")
    run_fairseq(
        "preprocess", "-s", "de", "-t", "en", "--trainpref", folder / "train", "--testpref", folder / "test",
        "--destdir", folder / "bin", "--joined-dictionary", "--thresholdsrc", 3, "--thresholdtgt", 3, "--workers", 1,
    )  # fmt: skip
    run_fairseq("train", folder / "bin", "--user-dir", Path(package).parent, "--save-dir", folder / "run", *TRAIN)
    return folder


def export(trained, folder, *flags):
    """Export the trained model with its tokenizer."""
    texts = ["--sentencepiece-model", trained / "pieces.model", "--dict", trained / "bin" / "dict.de.txt"]
    assert main(["export-hf", *map(str, [trained / "run" / "checkpoint_last.pt", folder, *texts, *flags])]) == 0
    return folder


@pytest.mark.slow
def test_100_sentences_have_the_same_tokens(trained, nllb_moe, transformers, run_fairseq, tmp_path):
    checkpoint, words = trained / "run" / "checkpoint_last.pt", Dictionary.load(str(trained / "bin" / "dict.de.txt"))
    run_fairseq(
        "generate", trained / "bin", "--user-dir", Path(package).parent, "--path", checkpoint, "--gen-subset", "test", "--cpu",
        "--batch-size", 16, "--required-batch-size-multiple", 1, "--results-path", tmp_path, *DECODING,
    )  # fmt: skip
    lines = [line.split("\t") for line in (tmp_path / "generate-test.txt").read_text(encoding="utf-8").splitlines()]
    expected = {int(line[0][2:]): [words.index(word) for word in line[2].split()] for line in lines if line[0].startswith("H-")}
    folder = export(trained, tmp_path / "hf", *DECODING)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), nllb_moe.from_pretrained(folder).eval()
    sentences = (trained / "test.raw.de").read_text(encoding="utf-8").splitlines()
    found = {}
    for start in range(0, SENTENCES, 16):
        batch = tokenizer(sentences[start : start + 16], return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(**batch)
        found.update((start + i, [t for t in row if t > words.eos()]) for i, row in enumerate(tokens.tolist()))
    assert len({tuple(tokens) for tokens in expected.values()}) > SENTENCES // 2  # outputs depend on the input
    ended = [index for index in sorted(expected) if len(expected[index]) < LIMIT][:COMPARED]
    assert len(ended) == COMPARED
    assert [found[index] for index in ended] == [expected[index] for index in ended]


@pytest.mark.slow
def test_the_tokenizer_does_as_the_data_was_prepared(trained, transformers, tmp_path):
    words = Dictionary.load(str(trained / "bin" / "dict.de.txt"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(export(trained, tmp_path / "hf"))
    raw, pieces = ((trained / name).read_text(encoding="utf-8").splitlines() for name in ("test.raw.de", "test.de"))
    expected = [words.encode_line(line, add_if_not_exist=False).tolist() for line in pieces]
    assert tokenizer(raw).input_ids == expected
    known = [i for i, line in enumerate(expected) if words.unk() not in line]
    assert [tokenizer.decode(expected[i], skip_special_tokens=True) for i in known] == [" ".join(raw[i].split()) for i in known]
