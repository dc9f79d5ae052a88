"""Dense language models give the same logits as XGLM of transformers."""

import argparse

import pytest
import torch

from fairseq_sparsemixer.cli import main
from fairseq_sparsemixer.plugin.models import transformer_lm_moe
from fairseq_sparsemixer.plugin.models.transformer_lm_moe import TransformerLanguageModelMoE, TransformerLanguageModelMoEConfig

PAD = 1


@pytest.fixture
def checkpoint(save, words_task):
    """checkpoint(**flags) -> (model, path)"""

    def build(**flags):
        sizes = {"layers": 2, "embed_dim": 16, "ffn_embed_dim": 24, "attention_heads": 2}
        given = {**{f"decoder_{name}": value for name, value in sizes.items()}, "router": "dense", **flags}
        args = argparse.Namespace(arch="transformer_lm_moe_base", tokens_per_sample=32, max_target_positions=32, **given)
        transformer_lm_moe.base(args)
        model = TransformerLanguageModelMoE.build_model(TransformerLanguageModelMoEConfig.from_namespace(args), words_task)
        return model.eval(), save(args, model)

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"share_decoder_input_output_embed": True},
        {"share_decoder_input_output_embed": True, "activation_fn": "gelu", "no_scale_embedding": True},
    ],
)
def test_a_dense_language_model_gives_the_same_logits(flags, transformers, checkpoint, language_modeling_batch, exported):
    model, path = checkpoint(**flags)
    other = transformers.AutoModelForCausalLM.from_pretrained(exported(path)).eval()
    tokens = language_modeling_batch(5, 3, 7)["net_input"]["src_tokens"]
    with torch.no_grad():
        expected, found = model(tokens)[0], other(input_ids=tokens, attention_mask=tokens.ne(PAD)).logits
    assert type(other).__name__ == "XGLMForCausalLM"
    torch.testing.assert_close(found[tokens != PAD], expected[tokens != PAD], atol=1e-5, rtol=1e-5)


REFUSALS = {
    "experts": ({"router": "switch"}, "--router switch does not fit XGLM of transformers, whose layers have no experts"),
    "positions": ({"decoder_learned_pos": True}, "--decoder-learned-pos does not fit XGLM"),
    "no last norm": ({"no_decoder_final_norm": True}, "--no-decoder-final-norm does not fit XGLM"),
    "wide inputs": ({"decoder_input_dim": 24}, "--decoder-input-dim 24 does not fit XGLM"),
    "scaled heads": ({"scale_heads": True}, "--scale-heads does not fit XGLM of transformers, whose heads have no factors"),
    "scaled attention": ({"scale_attn": True}, "--scale-attn does not fit XGLM"),
    "scaled residuals": ({"scale_resids": True}, "--scale-resids does not fit XGLM"),
    "scaled layers": ({"scale_fc": True}, "--scale-fc does not fit XGLM"),
    "softmax": ({"adaptive_softmax_cutoff": "8,16"}, "--adaptive-softmax-cutoff .* does not fit XGLM"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_refused_by_its_flag(case, checkpoint, tmp_path):
    flags, sentence = REFUSALS[case]
    _, path = checkpoint(**flags)
    with pytest.raises(SystemExit, match=f"^fairseq-sparsemixer: {sentence}"):
        main(["export-hf", str(path), str(tmp_path / "hf")])
