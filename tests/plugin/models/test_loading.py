"""A checkpoint with other experts than the flags gives a one-line error."""

from argparse import Namespace

import pytest
import torch

from fairseq_sparsemixer.errors import ConfigurationError
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


@pytest.mark.parametrize("kept, message", [
    ("0,5", "--encoder-layers-to-keep 0,5 names layer 5, but those of the checkpoint are 0 to 1"),
    ("0,x", "--encoder-layers-to-keep 0,x must list layer numbers"),
    ("0,0", "--encoder-layers-to-keep 0,0 must list layer numbers, each once"),
    ("-1", "--encoder-layers-to-keep -1 must list layer numbers"),
    ([0, 1], r"--encoder-layers-to-keep \[0, 1\] must list layer numbers"),
])  # fmt: skip
def test_invalid_layers_to_keep_are_named(build_translation_model, kept, message):
    state = build_translation_model().state_dict()
    with pytest.raises(ConfigurationError, match=message):
        pruned = build_translation_model(encoder_layers_to_keep=kept)
        pruned.load_state_dict(state, model_cfg=Namespace(arch="transformer_moe", encoder_layers_to_keep=kept))
