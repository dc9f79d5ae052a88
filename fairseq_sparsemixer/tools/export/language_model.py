"""Language models without experts: XGLM, which is fairseq's, normalising before each part, with sinusoidal positions."""

from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.tools.export.fairseq_transformer import (
    common_config,
    move_layers,
    refuse_outside,
    require_normalisation,
    transformer_config,
)
from fairseq_sparsemixer.tools.export.generation import EOS, SPECIAL
from fairseq_sparsemixer.tools.export.source import Export, Source, as_is, dtype_name, refuse, same

XGLM = "XGLM"


def export_language_model(source: Source) -> Export:
    """The export of `transformer_lm` and dense `transformer_lm_moe`. Raises ConfigurationError for what does not fit."""
    if source.router != DENSE:
        raise refuse("router", source.router, XGLM, "whose layers have no experts, as those of no language model like fairseq's")
    cfg = transformer_config(source)
    refuse_outside(cfg, source.args, ["decoder"], XGLM)
    require_normalisation(cfg, ["decoder"], True, XGLM)
    weights = source.weights
    table = weights.take("decoder.embed_tokens.weight")
    output = weights.take("decoder.output_projection.weight")
    tied = same(table, output)
    config = {
        **common_config(cfg, XGLM),
        **SPECIAL,
        "architectures": ["XGLMForCausalLM"],
        "model_type": "xglm",
        "d_model": cfg.decoder.embed_dim,
        "ffn_dim": cfg.decoder.ffn_embed_dim,
        "num_layers": cfg.decoder.layers,
        "attention_heads": cfg.decoder.attention_heads,
        "layerdrop": float(cfg.decoder.layerdrop),
        "max_position_embeddings": cfg.max_target_positions,
        "vocab_size": len(table),
        "decoder_start_token_id": EOS,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype_name(table),
        "use_cache": True,
    }
    tensors = {"model.embed_tokens.weight": as_is(table)}
    tensors.update(move_layers(weights, "decoder", cfg.decoder.layers, "model.", cross=False))
    for part in ("weight", "bias"):
        tensors[f"model.layer_norm.{part}"] = as_is(weights.take(f"decoder.layer_norm.{part}"))
    if not tied:
        tensors["lm_head.weight"] = as_is(output)
    weights.refuse_rest(XGLM)
    return Export("XGLMForCausalLM", config, tensors, dict(SPECIAL))
