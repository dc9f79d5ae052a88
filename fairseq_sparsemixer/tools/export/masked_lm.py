"""Masked language models without experts: Roberta."""

from functools import partial

import torch

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.tools.export.fairseq_transformer import FEED_FORWARD, SELF, attention
from fairseq_sparsemixer.tools.export.generation import SPECIAL
from fairseq_sparsemixer.tools.export.source import Export, Source, activation, as_is, dtype_name, made, refuse, same

ROBERTA = "Roberta"
STACK = "encoder.sentence_encoder."
NAMES = {
    **dict(zip(attention("self_attn"), ("attention.self.key", "attention.self.value", "attention.self.query"))),
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}
OUTSIDE = {
    "encoder_normalize_before": "which normalises after each part of a layer",
    "untie_weights_roberta": "whose output is tied to its embeddings",
    "encoder_layers_to_keep": "which keeps every layer",
    "quant_noise_scalar": "whose weights are not quantised",
}


def export_masked_lm(source: Source) -> Export:
    """The export of `roberta` and dense `roberta_moe`. Raises ConfigurationError for what does not fit."""
    args, weights = source.args, source.weights
    if source.router != DENSE:
        raise refuse("router", source.router, ROBERTA, "whose layers have no experts")
    for name, why in OUTSIDE.items():
        if getattr(args, name, False):
            raise refuse(name, getattr(args, name), ROBERTA, why)
    if any(name.startswith("classification_heads.") for name in weights.left):
        raise ConfigurationError("the checkpoint has a classification head; export-hf exports masked language models alone")
    words, positions = (weights.take(f"{STACK}{name}.weight") for name in ("embed_tokens", "embed_positions"))
    if not same(words, weights.take("encoder.lm_head.weight")):
        raise refuse("untie_weights_roberta", True, ROBERTA, OUTSIDE["untie_weights_roberta"])
    types = partial(torch.zeros, 1, words.size(1), dtype=words.dtype)
    bias = as_is(weights.take("encoder.lm_head.bias"))
    tensors = {
        "roberta.embeddings.word_embeddings.weight": as_is(words),
        "roberta.embeddings.position_embeddings.weight": as_is(positions),
        "roberta.embeddings.token_type_embeddings.weight": made(types, words[:1].shape, words.dtype),
        **weights.move(["layernorm_embedding"], STACK, "roberta.embeddings.", {"layernorm_embedding": "LayerNorm"}),
    }
    for index in range(args.encoder_layers):
        source_layer, layer = f"{STACK}layers.{index}.", f"roberta.encoder.layer.{index}."
        tensors.update(weights.move([*SELF, *FEED_FORWARD], source_layer, layer, NAMES))
    tensors.update(weights.move(["dense", "layer_norm"], "encoder.lm_head.", "lm_head.", {}))
    tensors["lm_head.bias"] = bias
    weights.refuse_rest(ROBERTA)
    config = {
        **SPECIAL,
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "hidden_size": words.size(1),
        "num_hidden_layers": args.encoder_layers,
        "num_attention_heads": args.encoder_attention_heads,
        "intermediate_size": args.encoder_ffn_embed_dim,
        "hidden_act": activation(args, ROBERTA),
        "hidden_dropout_prob": float(args.dropout),
        "attention_probs_dropout_prob": float(args.attention_dropout),
        "max_position_embeddings": len(positions),
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "torch_dtype": dtype_name(words),
    }
    return Export("RobertaForMaskedLM", config, tensors, dict(SPECIAL))
