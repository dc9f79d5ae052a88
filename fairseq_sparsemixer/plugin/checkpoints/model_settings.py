"""Which settings of a checkpoint's model decide what it computes, beside the shapes of its weights."""

import argparse
import re
from typing import Any, Dict, Optional

from fairseq.models import ARCH_MODEL_NAME_REGISTRY

# Settings with these names change what a model computes, where its weights have the same names and shapes.
OF_THE_FUNCTION = re.compile(
    r"(encoder|decoder)_(attention_heads|normalize_before|learned_pos|layers_to_keep|output_dim|input_dim)"
    r"|share_\w+|tie_\w+|adaptive_(input|softmax)\w*(cutoff|factor)|(pooler_)?activation_fn|cross_self_attention"
    r"|no_(scale_embedding|token_positional_embeddings|cross_attention|decoder_final_norm)|layernorm_embedding"
    r"|router|moe_top_k|moe_(eom|fom)|jitter_eps|eval_capacity_factor|router_(score|weights|scale|groups|topk_groups|option)|expert_activation"
    r"|expert_lora_alpha"
)


def as_dict(settings: Any) -> Dict[str, Any]:
    """A copy of settings, which fairseq writes as a dictionary or a Namespace, as a dictionary."""
    return dict(vars(settings) if isinstance(settings, argparse.Namespace) else settings)


def in_form_of(settings: Any, values: Dict[str, Any]) -> Any:
    """The values as a dictionary or a Namespace, whichever `settings` is."""
    return argparse.Namespace(**values) if isinstance(settings, argparse.Namespace) else values


def model_settings(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of a checkpoint's model by name, as new and old fairseq write them; empty if there are none."""
    settings: Any = state.get("args") or (state.get("cfg") or {}).get("model") or {}
    return as_dict(settings)


def difference(one: Dict[str, Any], other: Dict[str, Any]) -> Optional[str]:
    """In which setting two checkpoints compute differently, in words; None if in none that both have."""
    first, second = model_settings(one), model_settings(other)
    for name in sorted(first.keys() & second.keys()):
        if OF_THE_FUNCTION.fullmatch(name) and first[name] != second[name]:
            return f"{name} is {second[name]!r}, not {first[name]!r}"
    models = [_model(settings) for settings in (second, first)]
    return f"the model is {models[0]}, not {models[1]}" if models[0] != models[1] else None


def _model(settings: Dict[str, Any]) -> Any:
    """The registered name of the model, of which there are several architectures."""
    name = settings.get("arch") or settings.get("_name")
    return ARCH_MODEL_NAME_REGISTRY.get(name, name)
