"""What all exports of fairseq's transformer share: the names of its layers' modules, its refusals, its config."""

from typing import Any, Dict, Iterable, List

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.models.layer_choice import stack_option
from fairseq_sparsemixer.plugin.models.transformer_moe import TransformerMoEConfig
from fairseq_sparsemixer.tools.export.source import Lazy, Source, Weights, activation, refuse

ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")
OUTSIDE = {  # flags whose computation no target has, whatever its weights
    "no_token_positional_embeddings": "which always has positions",
    "cross_self_attention": "whose decoder attends to the encoder alone",
    "no_cross_attention": "whose decoder attends to the encoder",
    "layernorm_embedding": "which does not normalise embeddings",
    "adaptive_input": "whose embeddings have one size",
    "adaptive_softmax_cutoff": "whose softmax is over all words",
    "tie_adaptive_weights": "whose softmax is over all words",
    "character_embeddings": "whose inputs are words",
    "char_inputs": "whose inputs are words",
    "base_layers": "which has no BASE layers",
    "quant_noise_scalar": "whose weights are not quantised",
    "scale_fc": "which does not normalise inside a layer",
    "scale_attn": "which does not normalise inside a layer",
    "scale_heads": "whose heads have no factors",
    "scale_resids": "whose residual connections have no factors",
}
OF_A_STACK = {
    "learned_pos": "whose positions are sinusoidal",
    "layers_to_keep": "which keeps every layer",
    "xformers_att_config": "whose attention is dense",
}


def attention(name: str) -> List[str]:
    """The modules of an attention."""
    return [f"{name}.{part}" for part in ATTENTION]


SELF = [*attention("self_attn"), "self_attn_layer_norm", "final_layer_norm"]
CROSS = [*attention("encoder_attn"), "encoder_attn_layer_norm"]
FEED_FORWARD = ["fc1", "fc2"]


def layer_modules(stack: str, cross: bool = True) -> List[str]:
    """The modules of a layer of `stack` with weight and bias, but for its feed-forward part."""
    return [*SELF, *(CROSS if stack == "decoder" and cross else ())]


def transformer_config(source: Source) -> TransformerMoEConfig:
    """The settings of fairseq's transformer, whatever form they were saved in."""
    cfg: TransformerMoEConfig = TransformerMoEConfig.from_namespace(source.args)
    return cfg


def refuse_outside(cfg: Any, args: Any, stacks: Iterable[str], model: str) -> None:
    """Raise ConfigurationError for what no target has."""
    for name, why in OUTSIDE.items():
        value = getattr(cfg, name, None) or getattr(args, name, None)
        if value:
            raise refuse(name, value, model, why)
    for stack in stacks:
        for name, why in OF_A_STACK.items():
            value = stack_option(cfg, stack, name) or getattr(args, f"{stack}_{name}", None)
            if value:
                raise refuse(f"{stack}_{name}", value, model, why)
    for name in ("input_dim", "output_dim"):
        value = getattr(cfg.decoder, name)
        if isinstance(value, int) and value != cfg.decoder.embed_dim:  # not given: a reference to embed_dim
            raise refuse(f"decoder_{name}", value, model, f"whose embeddings are as wide as its layers, {cfg.decoder.embed_dim}")


def require_normalisation(cfg: Any, stacks: Iterable[str], before: bool, model: str) -> None:
    """Raise ConfigurationError unless the layers of all stacks normalise before their parts, or after them.

    Before them, a stack also normalises its output.
    """
    for stack in stacks:
        if bool(getattr(cfg, stack).normalize_before) != before:
            where = "before" if before else "after"
            raise ConfigurationError(
                f"the model was trained {'without' if before else 'with'} --{stack}-normalize-before, but {model} of transformers"
                f" normalises {where} each part of a layer"
            )
    if before and cfg.no_decoder_final_norm:
        raise refuse("no_decoder_final_norm", True, model, "whose decoder normalises its output")


def common_config(cfg: Any, model: str) -> Dict[str, Any]:
    """The settings that all targets have, under transformers' names."""
    return {
        "activation_function": activation(cfg, model),
        "dropout": float(cfg.dropout),
        "attention_dropout": float(cfg.attention_dropout),
        "activation_dropout": float(cfg.activation_dropout or cfg.relu_dropout or 0),
        "scale_embedding": not cfg.no_scale_embedding,
    }


def move_layers(weights: Weights, stack: str, count: int, target: str, cross: bool = True) -> Dict[str, Lazy]:
    """The tensors of dense layers, named the same in each target: `target` + "layers.3.fc1.weight"."""
    modules, moved = [*layer_modules(stack, cross), *FEED_FORWARD], {}
    for index in range(count):
        moved.update(weights.move(modules, f"{stack}.layers.{index}.", f"{target}layers.{index}.", {}))
    return moved
