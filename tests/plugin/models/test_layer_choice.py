"""Which layers have experts: the forms of the flags, in models, checkpoints, metrics and pruned models."""

import json
from argparse import Namespace

import pytest
import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import moe_layers, named_moe_layers
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.layer_choice import experts_by_layer, experts_in_layer, resolve_layers

SIX = {"encoder": 6, "decoder": 6}


def options(**flags):
    return Namespace(**{**vars(MoEOptions()), **flags})


@pytest.mark.parametrize("text, expected", [
    ("1,3,5", {1: 8, 3: 8, 5: 8}),
    (" 5, 1 ", {1: 8, 5: 8}),
    ("1:4,3:16", {1: 4, 3: 16}),
    ("0,5:2", {0: 8, 5: 2}),
    ("all", dict.fromkeys(range(6), 8)),
    ("none", {}),
    ("last:4", dict.fromkeys((2, 3, 4, 5), 8)),
    ("last:6", dict.fromkeys(range(6), 8)),
    ("every:2", dict.fromkeys((0, 2, 4), 8)),
    ("every:2:1", dict.fromkeys((1, 3, 5), 8)),
    ("every:4:1", dict.fromkeys((1, 5), 8)),
    ("every:9", {0: 8}),
])  # fmt: skip
def test_each_form_names_its_layers(text, expected):
    assert experts_by_layer(options(encoder_moe_layers=text), "encoder", 6) == expected


def test_without_a_choice_moe_freq_counts_from_the_first_layer():
    cfg = options(moe_freq=3)
    assert experts_by_layer(cfg, "encoder", 6) is None
    assert [experts_in_layer(cfg, "encoder", index, 6) for index in range(6)] == [8, 0, 0, 8, 0, 0]
    assert not any(experts_in_layer(options(router="dense"), "encoder", index, 6) for index in range(6))


@pytest.mark.parametrize("flags, message", [
    (dict(encoder_moe_layers="6"), "--encoder-moe-layers 6 names layer 6, but the layers are 0 to 5"),
    (dict(decoder_moe_layers="last:7"), "--decoder-moe-layers last:7 must keep between 1 and 6 layers"),
    (dict(encoder_moe_layers="last:0"), "--encoder-moe-layers last:0 must keep between 1 and 6"),
    (dict(encoder_moe_layers="every:0"), "--encoder-moe-layers every:0 must have a step of at least 1"),
    (dict(encoder_moe_layers="every:2:6"), "a start below 6, the number of layers"),
    (dict(encoder_moe_layers="1,1"), "must name each layer once"),
    (dict(encoder_moe_layers="1:0"), "with at least one expert"),
    (dict(encoder_moe_layers="1;2"), "must be a list such as 1,3,5 or 1:8,3:16, or all, none, last:4"),
    (dict(encoder_moe_layers=""), "must be a list"),
    (dict(encoder_moe_layers="-1"), "must be a list"),
    (dict(encoder_moe_layers="none", decoder_moe_layers="none"), "the flags leave no layer with experts; .* or --router dense"),
    (dict(decoder_moe_layers="1", moe_encoder_only=True), "--decoder-moe-layers 1 contradicts --moe-encoder-only"),
])  # fmt: skip
def test_layers_that_cannot_be_are_refused(flags, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_layers(options(**flags), SIX)


def test_a_flag_of_a_stack_that_the_model_has_not_is_refused():
    with pytest.raises(ConfigurationError, match="--encoder-moe-layers all does not apply to a model without encoder"):
        resolve_layers(options(encoder_moe_layers="all"), {"decoder": 6})


def test_the_choice_becomes_a_list_and_a_list_stays():
    cfg = options(encoder_moe_layers="every:3:2", decoder_moe_layers="1:4,0")
    for _ in range(2):
        resolve_layers(cfg, SIX)
        assert (cfg.encoder_moe_layers, cfg.decoder_moe_layers) == ("2,5", "0,1:4")


def test_the_model_has_experts_where_the_flags_say(build_translation_model):
    model = build_translation_model(
        encoder_layers=3, decoder_layers=4, encoder_moe_layers="1", decoder_moe_layers="0:2,3", expert_ffn_embed_dim=12
    )
    found = {name: (layer.gate.num_experts, layer.experts.weight_in.size(2)) for name, layer in named_moe_layers(model)}
    assert found == {"encoder.layers.1": (4, 12), "decoder.layers.0": (2, 12), "decoder.layers.3": (4, 12)}


def test_each_layers_number_of_experts_is_checked(build_translation_model):
    sentence = "--moe-top-k 3 must lie between 1 and --num-experts 2; layers have 2 experts by --encoder-moe-layers"
    with pytest.raises(ConfigurationError, match=sentence):
        build_translation_model(router="sparsemixer_v2", moe_top_k=3, encoder_moe_layers="0:2")


def test_a_router_that_looks_ahead_is_allowed_where_only_the_encoder_has_experts(build_translation_model):
    model = build_translation_model(router="expert_choice", decoder_moe_layers="none")
    assert [name.split(".")[0] for name, _ in named_moe_layers(model)] == ["encoder"]
    with pytest.raises(ConfigurationError, match="--router expert_choice lets"):
        build_translation_model(router="expert_choice", decoder_moe_layers="last:1")


def test_training_logs_saves_and_loads_layers_with_different_numbers_of_experts(train, tmp_path):
    load_file = tmp_path / "load.jsonl"
    layers = ("--encoder-moe-layers", "0:2,1:6", "--decoder-moe-layers", "last:1", "--encoder-layers", 2, "--decoder-layers", 2)
    bias = ("--moe-bias-update-rate", 0.01)
    logs = train(*layers, *bias, "--max-epoch", 2, "--moe-load-file", load_file, "--moe-load-interval", 1)
    assert all(figures["moe_experts_per_token"] == 1 for figures in logs["train_inner"])
    assert all(figures["moe_load_max"] >= 1 >= figures["moe_load_min"] for figures in logs["train_inner"])
    for line in map(json.loads, load_file.read_text().splitlines()):
        assert line["layers"] == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.1"]
        assert [len(counts) for counts in line["load"]] == [2, 6, 4]
        assert sum(line["load"][0]) == sum(line["load"][1])  # every token in every layer
    path = str(tmp_path / "run" / "checkpoint_last.pt")
    state = torch.load(path)
    saved = state["cfg"]["model"]
    assert (saved.encoder_moe_layers, saved.decoder_moe_layers) == ("0:2,1:6", "1")
    (model,), _ = checkpoint_utils.load_model_ensemble([path])
    assert [layer.gate.num_experts for layer in moe_layers(model)] == [2, 6, 4]


def test_a_pruned_model_keeps_the_experts_of_its_layers(train, tmp_path):
    train("--encoder-layers", 3, "--encoder-moe-layers", "last:1", "--decoder-moe-layers", "none", "--max-epoch", 1)
    path = str(tmp_path / "run" / "checkpoint_last.pt")
    (whole,), _ = checkpoint_utils.load_model_ensemble([path])
    (pruned,), _ = checkpoint_utils.load_model_ensemble(
        [path], arg_overrides={"encoder_layers_to_keep": "0,2", "decoder_layers_to_keep": "0,1"}
    )
    assert [name for name, _ in named_moe_layers(pruned)] == ["encoder.layers.1"]
    kept, original = moe_layers(pruned)[0].experts.weight_in, moe_layers(whole)[0].experts.weight_in
    assert torch.equal(kept, original)
