"""Which settings decide what a model computes in evaluation, beside the names and shapes of its weights."""

import argparse
import inspect
import math
import re
from typing import Any, Dict, Optional

from fairseq.models import ARCH_MODEL_NAME_REGISTRY

from fairseq_sparsemixer.moe.gates import DENSE, Gate
from fairseq_sparsemixer.moe.gates.registry import GATES, gate_options
from fairseq_sparsemixer.moe.lora import scale_of
from fairseq_sparsemixer.options import FIELDS, FLAGS, MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict, model_settings
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults
from fairseq_sparsemixer.plugin.models.router_options import router_options

OF_FAIRSEQ = re.compile(
    r"(encoder|decoder)_(attention_heads|normalize_before|learned_pos|layers_to_keep|output_dim|input_dim|xformers_att_config)"
    r"|share_\w+|tie_\w+|adaptive_(input|softmax)\w*(cutoff|factor)|(pooler_)?activation_fn|cross_self_attention"
    r"|no_(scale_embedding|token_positional_embeddings|cross_attention|decoder_final_norm)|layernorm_embedding"
)
# Options of routers that act in training only, or through a state that is among the weights.
TRAINING = frozenset(
    "gradient_estimator estimator_at_argmax sampled second_expert_policy bias_update_rate default_decay threshold_decay"
    " warmup_updates l1_coefficient l1_multiplier".split()
)
TRAINING_OF = {"switch": "jitter_eps", "round_robin": "capacity_factor", "expert_threshold": "top_k", "remoe": "top_k"}
DROPS = ("capacity_policy", "normalise_before_dropping")  # act where tokens are dropped


def difference(one: Dict[str, Any], other: Dict[str, Any]) -> Optional[str]:
    """In which setting two checkpoints compute differently in evaluation, in words; None if in none.

    A setting of fairseq counts if both have it; those of experts have defaults.
    """
    settings = [model_settings(state) for state in (other, one)]
    for values in (list(map(_of_fairseq, settings)), list(map(_of_experts, settings))):
        for name in sorted(values[0].keys() & values[1].keys()):
            if values[0][name] != values[1][name]:
                return f"{name} is {values[0][name]!r}, not {values[1][name]!r}"
    models = [_model(own) for own in settings]
    return f"the model is {models[0]}, not {models[1]}" if models[0] != models[1] else None


def _of_fairseq(settings: Dict[str, Any]) -> Dict[str, Any]:
    """By flag. fairseq's TransformerConfig keeps those of a stack in a part of it."""
    stacks = {
        stack: settings[stack] for stack in ("encoder", "decoder") if isinstance(settings.get(stack), (dict, argparse.Namespace))
    }
    flat = {f"{stack}_{name}": value for stack, own in stacks.items() for name, value in as_dict(own).items()}
    return {_flag(name): value for name, value in {**flat, **settings}.items() if OF_FAIRSEQ.fullmatch(name)}


def _of_experts(settings: Dict[str, Any]) -> Dict[str, Any]:
    """By flag; only the router, if it is dense; empty for a model without this package's flags."""
    if "router" not in settings:
        return {}
    cfg = argparse.Namespace(**settings)
    fill_defaults(cfg, MoEOptions)
    if cfg.router == DENSE:
        return {"--router": cfg.router}
    options = _of_router(cfg)
    return {
        "--router": cfg.router,
        "--moe-eom": cfg.moe_eom,
        "--moe-fom": cfg.moe_fom,
        "--expert-activation": cfg.expert_activation or settings.get("activation_fn"),
        "--expert-lora-alpha": cfg.expert_lora_rank and scale_of(cfg.expert_lora_rank, cfg.expert_lora_alpha),
        **{FLAGS.get(name, f"--router-option {name}"): value for name, value in options.items()},
    }


def _of_router(cfg: Any) -> Dict[str, Any]:
    """Its options, with its own defaults, that act in evaluation. Of a router that is not registered, all that flags give."""
    if cfg.router in GATES:
        known = {**inspect.signature(Gate.__init__).parameters, **inspect.signature(GATES[cfg.router].__init__).parameters}
        options = {**{name: known[name].default for name in gate_options(cfg.router)}, **router_options(cfg)}
    else:
        options = {**{name: getattr(cfg, flag.name) for name, flag in FIELDS.items()}, "router_option": cfg.router_option}
    options = {name: None if value == math.inf else value for name, value in options.items()}
    ignored = {*TRAINING, TRAINING_OF.get(cfg.router)}
    if "eval_capacity_factor" in options:
        ignored.add("capacity_factor")
        ignored.update(DROPS if options["eval_capacity_factor"] is None else ())
    return {name: value for name, value in options.items() if name not in ignored}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _model(settings: Dict[str, Any]) -> Any:
    """The registered name of the model, of which there are several architectures."""
    name = settings.get("arch") or settings.get("_name")
    return ARCH_MODEL_NAME_REGISTRY.get(name, name)
