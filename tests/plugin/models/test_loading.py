"""A checkpoint with other experts than the flags gives a one-line error."""

from argparse import Namespace

import pytest
import torch
from fairseq.checkpoint_utils import load_model_ensemble
from omegaconf import OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import named_moe_layers
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.models.loading import check_checkpoint_fits


@pytest.mark.parametrize("ours, theirs, message", [
    (dict(num_experts=4), dict(num_experts=2), "--num-experts 4 does not match the checkpoint, which has 2 experts in"),
    (dict(moe_freq=1), dict(moe_freq=2), "the flags have experts in .*, but the checkpoint has none there; give the --router"),
    (dict(), dict(router="dense"), "the checkpoint is dense, .* fairseq-sparsemixer upcycle .* or use --router dense"),
    (dict(moe_bias_update_rate=0.1), dict(), "flags has .*balancer.bias, .* with or without --moe-bias-update-rate, the"),
    (dict(), dict(moe_bias_update_rate=0.1), "checkpoint has .*balancer.bias, .* with or without --moe-bias-update-rate, the"),
    (dict(num_shared_experts=2), dict(), "--num-shared-experts gives .* a total width of 64, but the checkpoint's have 0"),
    (dict(), dict(num_shared_experts=1), "--num-shared-experts gives .* a total width of 0, but the checkpoint's have 32"),
    (dict(num_shared_experts=1), dict(num_shared_experts=2), "a total width of 32, but the checkpoint's have 64"),
    (dict(moe_freq=2), dict(moe_freq=1), "the checkpoint has experts in .*, but the flags have none there"),
    (dict(router="dense"), dict(), "the checkpoint has experts in decoder.layers.0"),
    (dict(router="switch"), dict(router="sparsemixer"), "router of the checkpoint has .*omega, but that of the flags has not"),
    (dict(router="sparsemixer"), dict(router="switch"), "router of the flags has .*omega, but that of the checkpoint has not"),
    (dict(router_bias=True), dict(), "flags has .*projection.bias, .* give the --router, with or without --router-bias, the"),
    (dict(), dict(encoder_ffn_embed_dim=48), "is .* in the checkpoint, but .* by the flags; give the embedding and feed-forward"),
])  # fmt: skip
def test_a_mismatch_is_named_with_the_remedy(build_translation_model, ours, theirs, message):
    state = build_translation_model(**theirs).state_dict()
    model = build_translation_model(**ours)
    with pytest.raises(ConfigurationError, match="^fairseq-sparsemixer: .*" + message):
        model.load_state_dict(state)


@pytest.mark.parametrize("flags", [dict(), dict(router="switch", moe_freq=1), dict(router="dense")])
def test_a_checkpoint_made_with_the_same_flags_fits(build_translation_model, flags):
    state = build_translation_model(**flags).state_dict()
    model = build_translation_model(**flags)
    check_checkpoint_fits(model, state)
    model.load_state_dict(state)


@pytest.mark.parametrize("moe_freq", [1, 2, 3])
@pytest.mark.parametrize("kept", ["0,2,3", "1,3", "3", "2,0"])
def test_a_pruned_model_equals_the_whole_model_without_the_other_layers(
    build_translation_model, translation_batch, moe_freq, kept
):
    flags = dict(encoder_layers=4, decoder_layers=4, moe_freq=moe_freq, router="switch")
    whole = build_translation_model(**flags).eval()
    pruned = build_translation_model(**flags, encoder_layers_to_keep=kept, decoder_layers_to_keep=kept).eval()
    settings = Namespace(arch="transformer_moe", encoder_layers_to_keep=kept, decoder_layers_to_keep=kept)
    pruned.load_state_dict(whole.state_dict(), model_cfg=settings)
    for stack in (whole.encoder, whole.decoder):
        stack.layers = torch.nn.ModuleList(stack.layers[index] for index in sorted(map(int, kept.split(","))))
        stack.num_layers = len(stack.layers)
    net_input = translation_batch(3, 6)["net_input"]
    assert torch.equal(pruned(**net_input)[0], whole(**net_input)[0])


def test_a_stack_that_is_not_pruned_keeps_its_layers(build_translation_model, translation_batch):
    flags = dict(encoder_layers=3, router="switch", moe_freq=1)
    whole = build_translation_model(**flags).eval()
    pruned = build_translation_model(**flags, encoder_layers_to_keep="0,2").eval()
    pruned.load_state_dict(whole.state_dict(), model_cfg=Namespace(arch="transformer_moe", encoder_layers_to_keep="0,2"))
    del whole.encoder.layers[1]
    net_input = translation_batch(3, 6)["net_input"]
    assert torch.equal(pruned(**net_input)[0], whole(**net_input)[0])


@pytest.mark.parametrize("flags, layers", [
    (dict(encoder_moe_layers="2"), "1"),
    (dict(encoder_moe_layers="1"), "none"),
    (dict(encoder_moe_layers="0:2,2"), "0:2,1"),
    (dict(moe_freq=2), "0,1"),
    (dict(router="dense"), None),
])  # fmt: skip
@pytest.mark.parametrize("form", [Namespace, lambda **values: OmegaConf.create(values)], ids=["Namespace", "hydra"])
def test_pruning_leaves_the_settings_of_the_pruned_model(build_translation_model, flags, layers, form):
    flags = {"encoder_layers": 3, **flags}
    state = build_translation_model(**flags).state_dict()
    given = {**vars(MoEOptions()), "arch": "transformer_moe", "_name": "transformer_moe", "num_experts": 4, **flags}
    saved = form(**given, encoder_layers_to_keep="0,2")
    build_translation_model(**flags, encoder_layers_to_keep="0,2").load_state_dict(state, model_cfg=saved)
    assert (saved.encoder_layers, saved.encoder_layers_to_keep, saved.encoder_moe_layers) == (2, None, layers)


@pytest.mark.slow
def test_a_model_pruned_by_flags_trains_on_and_its_checkpoint_loads(train, tmp_path):
    flags = ("--encoder-layers", 3, "--encoder-moe-layers", "0:2,2", "--decoder-moe-layers", "none", "--max-epoch", 1)
    train(*flags)
    path, kept = tmp_path / "run" / "checkpoint_last.pt", ("--encoder-layers-to-keep", "1,2")
    train(*flags, *kept, "--finetune-from-model", path, "--save-dir", tmp_path / "pruned")
    (model,), _ = load_model_ensemble([str(tmp_path / "pruned" / "checkpoint_last.pt")])
    assert [(name, layer.gate.num_experts) for name, layer in named_moe_layers(model)] == [("encoder.layers.1", 4)]
    assert len(model.encoder.layers) == 2


@pytest.mark.parametrize("kept, message", [
    ("0,5", "--encoder-layers-to-keep 0,5 names layer 5, but those of the checkpoint are 0 to 1"),
    ("0,x", "--encoder-layers-to-keep 0,x must list layer numbers"),
    ("0,0", "--encoder-layers-to-keep 0,0 must list layer numbers, each once"),
    ("-1", "--encoder-layers-to-keep -1 must list layer numbers"),
    ([0, 5], "--encoder-layers-to-keep 0,5 names layer 5, but those of the checkpoint are 0 to 1"),
    ([0, 0], "--encoder-layers-to-keep 0,0 must list layer numbers, each once"),
    (3, "--encoder-layers-to-keep 3 names layer 3"),
])  # fmt: skip
def test_invalid_layers_to_keep_are_named(build_translation_model, kept, message):
    state = build_translation_model().state_dict()
    with pytest.raises(ConfigurationError, match=message):
        pruned = build_translation_model(encoder_layers_to_keep=kept)
        pruned.load_state_dict(state, model_cfg=Namespace(arch="transformer_moe", encoder_layers_to_keep=kept))
