"""Translation models: NllbMoe with experts, else M2M100 (normalising before each part) or FSMT (after it)."""

from typing import Any, Dict

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS
from fairseq_sparsemixer.tools.export.fairseq_transformer import (
    common_config,
    move_layers,
    refuse_outside,
    require_normalisation,
    transformer_config,
)
from fairseq_sparsemixer.tools.export.generation import EOS, SPECIAL, Decoding, generation_config
from fairseq_sparsemixer.tools.export.nllb_moe import CLASS as NLLB_MOE
from fairseq_sparsemixer.tools.export.nllb_moe import expert_config, expert_layers, place_experts
from fairseq_sparsemixer.tools.export.source import Export, Lazy, Source, Weights, as_is, dtype_name, made, refuse, same

M2M100, FSMT = "M2M100", "FSMT"
TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "decoder.output_projection.weight")


def export_translation(source: Source, decoding: Decoding, dense_as_experts: bool = False) -> Export:
    """The export of `transformer` and `transformer_moe`. Raises ConfigurationError, naming the flag, for what does not fit."""
    cfg = transformer_config(source)
    sparse = any(".moe." in name for name in source.weights.left)
    before = sparse or bool(cfg.encoder.normalize_before)
    model = NLLB_MOE if sparse else M2M100 if before else FSMT
    refuse_outside(cfg, source.args, STACKS, model)
    require_normalisation(cfg, STACKS, before, model)
    if cfg.encoder.embed_dim != cfg.decoder.embed_dim:
        raise refuse("decoder_embed_dim", cfg.decoder.embed_dim, model, f"whose stacks share {cfg.encoder.embed_dim}")
    tables = [source.weights.take(name) for name in TABLES]
    config = {
        **_sizes(cfg),
        **common_config(cfg, model),
        **SPECIAL,
        "architectures": [f"{model}ForConditionalGeneration"],
        "decoder_start_token_id": EOS,
        "is_encoder_decoder": True,
        "torch_dtype": dtype_name(tables[0]),
        "use_cache": True,
    }
    if model == FSMT:
        config.update(_fsmt_config(source, tables))
        tensors = {f"model.{name}": made(table.clone, table.shape, table.dtype) for name, table in zip(TABLES, tables)}
    else:
        if not (same(tables[0], tables[1]) and same(tables[1], tables[2])):
            raise ConfigurationError(
                f"the model was trained without --share-all-embeddings, but {model} of transformers has one embedding table"
            )
        config.update(model_type="m2m_100", vocab_size=len(tables[0]), tie_word_embeddings=True)
        tensors = {"model.shared.weight": as_is(tables[0])}
    if sparse:
        placement = place_experts(source, cfg, dense_as_experts)
        config.update(expert_config(source, placement))
        for stack in STACKS:
            tensors.update(expert_layers(source, placement, stack, getattr(cfg, stack).layers))
    else:
        for stack in STACKS:
            tensors.update(move_layers(source.weights, stack, getattr(cfg, stack).layers, f"model.{stack}."))
    if before:
        tensors.update(_final_norms(source.weights))
    source.weights.refuse_rest(model)
    return Export(f"{model}ForConditionalGeneration", config, tensors, generation_config(decoding, cfg.max_target_positions))


def _sizes(cfg: Any) -> Dict[str, Any]:
    sizes: Dict[str, Any] = {"d_model": cfg.encoder.embed_dim}
    for stack in STACKS:
        own = getattr(cfg, stack)
        sizes.update({
            f"{stack}_layers": own.layers,
            f"{stack}_ffn_dim": own.ffn_embed_dim,
            f"{stack}_attention_heads": own.attention_heads,
            f"{stack}_layerdrop": float(own.layerdrop),
        })  # fmt: skip
    return {**sizes, "max_position_embeddings": max(cfg.max_source_positions, cfg.max_target_positions)}


def _fsmt_config(source: Source, tables: Any) -> Dict[str, Any]:
    if not same(tables[1], tables[2]):
        raise ConfigurationError(
            "the model was trained without --share-decoder-input-output-embed or --share-all-embeddings, but FSMT of transformers"
            " ties the decoder's embeddings to its output"
        )
    languages = [str(source.task.get(f"{side}_lang") or side) for side in ("source", "target")]
    sizes = {"src_vocab_size": len(tables[0]), "tgt_vocab_size": len(tables[1])}
    return {"model_type": "fsmt", "langs": languages, **sizes, "tie_word_embeddings": False}  # three tables, equal or not


def _final_norms(weights: Weights) -> Dict[str, Lazy]:
    return {
        f"model.{stack}.layer_norm.{part}": as_is(weights.take(f"{stack}.layer_norm.{part}"))
        for stack in STACKS
        for part in ("weight", "bias")
    }
