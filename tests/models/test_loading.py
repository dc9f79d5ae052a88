"""A checkpoint whose experts are not those of the flags ends with one sentence."""

import pytest

from fairseq_sparsemixer.models.loading import check_checkpoint_fits


@pytest.mark.parametrize("ours, theirs, message", [
    (dict(num_experts=4), dict(num_experts=2), "--num-experts 4 does not match the checkpoint, which has 2 experts in"),
    (dict(moe_freq=1), dict(moe_freq=2), "the flags has experts in .* and the checkpoint have none there; give the --router and"),
    (dict(moe_freq=2), dict(moe_freq=1), "the checkpoint has experts in .* and the flags have none there"),
    (dict(router="dense"), dict(), "the checkpoint has experts in decoder.layers.0"),
    (dict(router="switch"), dict(router="sparsemixer"), "the router of the checkpoint has .*omega and that of the flags has not"),
    (dict(router="sparsemixer"), dict(router="switch"), "the router of the flags has .*omega and that of the checkpoint has not"),
    (dict(router_bias=True), dict(), "flags has .*projection.bias .* give the --router, with or without --router-bias, the"),
    (dict(), dict(encoder_ffn_embed_dim=48), "is .* in the checkpoint and .* by the flags; give the embedding and feed-forward"),
])  # fmt: skip
def test_a_mismatch_names_what_differs_and_what_to_do(build_translation_model, ours, theirs, message):
    state = build_translation_model(**theirs).state_dict()
    model = build_translation_model(**ours)
    with pytest.raises(SystemExit, match="^fairseq-sparsemixer: .*" + message) as caught:
        model.load_state_dict(state)
    assert not isinstance(caught.value, Exception)  # fairseq's trainer would turn one into advice of its own


@pytest.mark.parametrize("flags", [dict(), dict(router="switch", moe_freq=1), dict(router="dense")])
def test_what_the_same_flags_made_fits(build_translation_model, flags):
    state = build_translation_model(**flags).state_dict()
    model = build_translation_model(**flags)
    check_checkpoint_fits(model, state)
    model.load_state_dict(state)
