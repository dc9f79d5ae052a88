"""`fairseq-sparsemixer export-hf`: the folder it writes, and the input it refuses."""

import json
import os
import sys
from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.models.transformer_moe import tiny

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.fixture
def checkpoint(build_translation_model, tmp_path):
    """A checkpoint that fits NllbMoe."""
    flags = dict(encoder_normalize_before=True, decoder_normalize_before=True, share_all_embeddings=True, moe_freq=1)
    sizes = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 32, "attention_heads": 2}
    stacks = {f"{stack}_{name}": value for stack in ("encoder", "decoder") for name, value in sizes.items()}
    args = Namespace(arch="transformer_moe_tiny", **stacks, num_experts=4, router="gshard", **flags)
    tiny(args)
    weights = build_translation_model(router="gshard", **flags).state_dict()
    torch.save({"args": args, "model": weights}, tmp_path / "m.pt")  # as fairseq < 0.10 wrote it
    return tmp_path / "m.pt"


def export(checkpoint, *flags, folder="hf"):
    assert main(["export-hf", str(checkpoint), str(checkpoint.parent / folder), *map(str, flags)]) == 0
    return checkpoint.parent / folder


def refused(sentence, checkpoint, *flags, folder="hf"):
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: .*{sentence}"):
        export(checkpoint, *flags, folder=folder)


@pytest.mark.parametrize("flags", [["--beam", 4], ["--lenpen", 1.0], ["--max-len-b", 200]])
def test_decoding_of_a_model_that_does_not_translate_is_refused(checkpoint, flags):
    state = torch.load(checkpoint, weights_only=False)
    state["args"].arch = "roberta_moe"
    torch.save(state, checkpoint)
    value = " ".join(map(str, flags))
    refused(f"{value} is for translation models, and .*m.pt is of roberta_moe; leave it out", checkpoint, *flags)


def test_copies_of_dense_layers_are_refused_without_experts(checkpoint):
    state = torch.load(checkpoint, weights_only=False)
    state["args"].router = "dense"
    torch.save(state, checkpoint)
    refused("--dense-as-experts is for models with experts, and .*m.pt has none", checkpoint, "--dense-as-experts")


def tensors(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in safetensors_torch.load_file(path).items()}


def test_experts_are_written_one_by_one(checkpoint):
    model, found = torch.load(checkpoint, weights_only=False)["model"], tensors(export(checkpoint))
    layer, experts = "model.encoder.layers.1.ffn.", "encoder.layers.1.fc1.moe.experts."
    for expert in range(4):
        for part, ours in {"fc1": "in", "fc2": "out"}.items():
            weight, bias = (found[f"{layer}experts.expert_{expert}.{part}.{kind}"] for kind in ("weight", "bias"))
            assert torch.equal(weight, model[f"{experts}weight_{ours}"][expert].t())
            assert torch.equal(bias, model[f"{experts}bias_{ours}"][expert])
    assert torch.equal(found[f"{layer}router.classifier.weight"], model["encoder.layers.1.fc1.moe.gate.projection.weight"])


def test_weights_are_split_over_files_of_limited_size(checkpoint):
    whole, split = export(checkpoint), export(checkpoint, "--max-file-size", 2e-5, folder="split")
    files = sorted(split.glob("*.safetensors"))
    assert len(files) == 5 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((split / "model.safetensors.index.json").read_text())
    expected, found = tensors(whole), tensors(split)
    assert expected.keys() == found.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for path in files:
        held = safetensors_torch.load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= 20_000 or len(held) == 1
        assert all(index["weight_map"][name] == path.name for name in held)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


def test_the_figures_are_printed_and_written(checkpoint, capsys):
    folder = export(checkpoint, "--json", checkpoint.with_name("figures.json"))
    figures = json.loads(checkpoint.with_name("figures.json").read_text())
    values = sum(tensor.numel() for tensor in tensors(folder).values())
    assert figures["values"] == values and figures["files"] == ["model.safetensors"]
    assert f"NllbMoeForConditionalGeneration, {values:,} values, 1 file(s)" in capsys.readouterr().out


def test_decoding_flags_are_the_defaults_of_generate(checkpoint):
    written = json.loads((export(checkpoint, "--beam", 4, "--lenpen", 0.6) / "generation_config.json").read_text())
    assert (written["num_beams"], written["length_penalty"], written["max_length"]) == (4, 0.6, 202)


def test_a_folder_that_is_not_empty_is_replaced_only_on_request(checkpoint):
    folder = export(checkpoint, "--max-file-size", 2e-5)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    refused("is not empty; name a new folder, or replace this one's export with --overwrite", checkpoint)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    export(checkpoint, "--overwrite")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    refused("also has notes.txt, which --overwrite would remove", checkpoint, "--overwrite")
    assert (folder / "notes.txt").exists()


def test_an_interrupted_export_leaves_nothing(checkpoint, monkeypatch):
    def fail(*arguments, **options):
        open(arguments[1], "wb").write(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(safetensors_torch, "save_file", fail)
    before = sorted(checkpoint.parent.iterdir())
    refused("hf cannot be written .No space left on device", checkpoint)
    assert sorted(checkpoint.parent.iterdir()) == before


def test_without_safetensors_the_command_says_what_to_install(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(r'export-hf needs safetensors, which is not installed; pip install "fairseq-sparsemixer\[hf\]"', checkpoint)


def test_a_checkpoint_in_several_files_is_refused_with_the_command_that_joins_them(checkpoint, tmp_path):
    assert main(["reshard", str(checkpoint), str(tmp_path / "s.pt"), "--expert-parallel-size", "2"]) == 0
    join = ".*reshard .*--portable"
    refused(f"s.pt is a checkpoint in several files {join}", tmp_path / "s.pt")
    refused(f"s-rank-0.pt is one file of a sharded one; {join}", tmp_path / "s-rank-0.pt")


@pytest.mark.parametrize("flags, sentence", [
    (["--dict", "d"], "--dict d needs --sentencepiece-model"),
    (["--sentencepiece-model", "s"], "--sentencepiece-model s needs --dict"),
    (["--beam", 0], "--beam 0 must be at least 1"),
    (["--lenpen", "nan"], "--lenpen nan must be finite"),
    (["--max-file-size", 0], "--max-file-size 0.0 must be positive"),
])  # fmt: skip
def test_wrong_flags_are_refused(flags, sentence, checkpoint):
    refused(sentence, checkpoint, *flags)
    assert not checkpoint.with_name("hf").exists()


@pytest.mark.parametrize("folder, sentence", [("m.pt", "is not a folder"), ("no/hf", "no does not exist; create it first")])
def test_a_folder_that_cannot_be_written_is_refused(folder, sentence, checkpoint):
    refused(sentence, checkpoint, folder=folder)


def test_other_models_have_no_counterpart(checkpoint):
    state = torch.load(checkpoint, weights_only=False)
    state["args"].arch = "lstm"
    torch.save(state, checkpoint)
    refused("is of the model lstm, of which transformers has no counterpart", checkpoint)
