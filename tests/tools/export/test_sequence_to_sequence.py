"""Translation models give the same logits in transformers; what does not fit is refused by the name of its flag."""

import json

import pytest
import torch

from fairseq_sparsemixer.cli import main

PAD = 1
POST_NORM = {"encoder_normalize_before": False, "decoder_normalize_before": False}


def assert_same_logits(model, other, sample):
    """The same logits for all tokens but padding, within 1e-5."""
    inputs, kept = sample["net_input"], sample["target"] != PAD
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = other.eval()(
            input_ids=inputs["src_tokens"],
            attention_mask=inputs["src_tokens"].ne(PAD),
            decoder_input_ids=inputs["prev_output_tokens"],
            decoder_attention_mask=inputs["prev_output_tokens"].ne(PAD),
            use_cache=False,
        ).logits
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-5, rtol=1e-5)


EXPERTS = {
    "gshard": dict(moe_freq=1),
    "policy": dict(moe_freq=1, second_expert_policy="random", normalise_before_dropping=True, capacity_policy="batch"),
    "topk": dict(router="topk", moe_freq=1, router_bias=True),
    "masked": dict(moe_freq=1, moe_eom=0.2, moe_fom=0.5),
    "some layers": dict(encoder_moe_layers="1,3", decoder_moe_layers="3"),
    "encoder only": dict(encoder_moe_layers="2", moe_encoder_only=True),
    "wide": dict(moe_freq=1, expert_ffn_embed_dim=24),
    "gelu, unscaled": dict(moe_freq=1, activation_fn="gelu", expert_activation="gelu", no_scale_embedding=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPERTS)
def test_a_model_with_experts_gives_the_same_logits(case, nllb_moe, translation_checkpoint, translation_batch, exported):
    model, path = translation_checkpoint(**EXPERTS[case])
    other = nllb_moe.from_pretrained(exported(path))
    assert_same_logits(model, other, translation_batch(5, 3, 7))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_dense_layers_become_equal_experts_on_request(bias, nllb_moe, translation_checkpoint, translation_batch, exported):
    model, path = translation_checkpoint(router="topk", router_bias=bias, moe_freq=2, decoder_layers=3)
    other = nllb_moe.from_pretrained(exported(path, "--dense-as-experts"))
    assert (other.config.encoder_sparse_step, other.config.decoder_sparse_step) == (1, 1)
    assert_same_logits(model, other, translation_batch(5, 3, 7))


DENSE = {
    "M2M100": {},
    "M2M100, gelu": dict(activation_fn="gelu_accurate", no_scale_embedding=True),
    "FSMT": POST_NORM,
    "FSMT, encoder's own embeddings": dict(**POST_NORM, share_all_embeddings=False, share_decoder_input_output_embed=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", DENSE)
def test_a_dense_model_gives_the_same_logits(case, transformers, translation_checkpoint, translation_batch, exported):
    model, path = translation_checkpoint(router="dense", **DENSE[case])
    other = transformers.AutoModelForSeq2SeqLM.from_pretrained(exported(path))
    assert type(other).__name__ == f"{case.split(',')[0]}ForConditionalGeneration"
    assert_same_logits(model, other, translation_batch(5, 3, 7))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_without_transformers_the_files_are_the_same(translation_checkpoint, exported):
    """The command does not import it."""
    import sys

    before = sys.modules.get("transformers")
    _, path = translation_checkpoint(moe_freq=1)
    folder = exported(path)
    assert sys.modules.get("transformers") is before
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    assert config(folder)["model_type"] == "nllb-moe" and config(folder)["num_experts"] == 4


REFUSALS = {  # flags of the model -> the sentence
    "router": (dict(router="sparsemixer"), r"--router sparsemixer does not fit NllbMoe of transformers, whose tokens have"),
    "one expert": (dict(router="topk", moe_top_k=1), r"--moe-top-k 1 does not fit NllbMoe"),
    "score": (dict(router="topk", router_score="sigmoid"), r"--router-score sigmoid does not fit NllbMoe"),
    "raw": (dict(router="topk", router_weights="raw"), r"--router-weights raw does not fit NllbMoe"),
    "scale": (dict(router="topk", router_scale=2.5), r"--router-scale 2.5 does not fit NllbMoe"),
    "groups": (dict(router="topk", router_groups=2, router_topk_groups=1), r"--router-topk-groups 1 does not fit NllbMoe"),
    "bias": (dict(moe_bias_update_rate=0.1), r"--moe-bias-update-rate 0.1 does not fit NllbMoe"),
    "CMR": (dict(moe_cmr=True), r"--moe-cmr does not fit NllbMoe"),
    "shared": (dict(num_shared_experts=1), r"--num-shared-experts 1 does not fit NllbMoe"),
    "capacity": (
        dict(eval_capacity_factor=2.0, force_expert_choice=True),
        r"--eval-capacity-factor 2.0 does not fit NllbMoe of transformers, which is exported without a limit",
    ),
    "activation": (dict(expert_activation="geglu"), r"--expert-activation geglu does not fit NllbMoe"),
    "other activation": (
        dict(expert_activation="gelu"),
        r"--expert-activation gelu does not fit .* --activation-fn, which is relu",
    ),
    "places": (dict(moe_freq=2), r"--moe-freq or --encoder-moe-layers gives experts to layers 0,2 of 4 in the encoder, but"),
    "number": (dict(moe_freq=1, decoder_moe_layers="1:2,3:8"), r"--decoder-moe-layers 1:2,3:8 does not fit NllbMoe"),
    "width": (dict(encoder_moe_layers="1,3", expert_ffn_embed_dim=24), r"--expert-ffn-embed-dim 24 does not fit NllbMoe"),
    "norm": (POST_NORM, r"trained without --encoder-normalize-before, but NllbMoe of transformers normalises before"),
    "decoder's norm": (dict(router="dense", decoder_normalize_before=False), r"without --decoder-normalize-before, but M2M100"),
    "encoder's norm": (dict(router="dense", encoder_normalize_before=False), r"with --decoder-normalize-before, but FSMT"),
    "embeddings": (dict(router="dense", share_all_embeddings=False), r"without --share-all-embeddings, but M2M100"),
    "output": (dict(router="dense", share_all_embeddings=False, **POST_NORM), r"without --share-decoder-input-output-embed"),
    "positions": (dict(router="dense", encoder_learned_pos=True), r"--encoder-learned-pos does not fit M2M100"),
    "no positions": (dict(router="dense", no_token_positional_embeddings=True), r"--no-token-positional-embeddings does not fit"),
    "norm of embeddings": (dict(router="dense", layernorm_embedding=True), r"--layernorm-embedding does not fit M2M100"),
    "no last norm": (dict(router="dense", no_decoder_final_norm=True), r"--no-decoder-final-norm does not fit M2M100"),
    "no last norm, experts": (dict(no_decoder_final_norm=True), r"--no-decoder-final-norm does not fit NllbMoe"),
    "wide inputs": (dict(router="dense", decoder_input_dim=24), r"--decoder-input-dim 24 does not fit M2M100"),
    "wide outputs": (dict(router="dense", decoder_output_dim=24), r"--decoder-output-dim 24 does not fit M2M100"),
    "quantised": (dict(router="dense", quant_noise_scalar=0.1), r"--quant-noise-scalar 0.1 does not fit M2M100"),
    "square": (dict(router="dense", activation_fn="relu_squared"), r"--activation-fn relu_squared does not fit M2M100"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_by_its_flag(case, translation_checkpoint, tmp_path):
    flags, sentence = REFUSALS[case]
    _, path = translation_checkpoint(**{"moe_freq": 1, **flags})
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: .*{sentence}") as caught:
        main(["export-hf", str(path), str(tmp_path / "hf")])
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()
