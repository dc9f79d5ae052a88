"""The arguments of a model of fairseq's branches `moe` and `nllb` -> our options, and what a user has to know of them."""

from dataclasses import fields
from typing import Any, Dict, Iterable, List, Mapping

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict

EVAL_FRACTION = 0.25  # their default of --moe-eval-capacity-token-fraction
UNSUPPORTED = (  # their options that our models do not have and whose absence would change the outputs
    "alibi",
    "encoder_learned_sinusoidal",
    "decoder_learned_sinusoidal",
    "alternate_ffn_embed_dim",
    "alternate_decoder_ffn_embed_dim",
    "scale_heads",  # theirs also transposes the heads' outputs, [.., heads, width] to [.., width, heads]
)


def arguments(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of their model. Raises ConfigurationError for a model that ours cannot be."""
    theirs = as_dict(cfg.get("model") or {})
    arch = str(theirs.get("arch") or theirs.get("_name"))
    if not arch.startswith("transformer"):
        raise ConfigurationError(f"the checkpoint is of the model {arch}; convert supports transformer and transformer_lm")
    for name in UNSUPPORTED:
        if theirs.get(name):
            flag = name.replace("_", "-")
            raise ConfigurationError(f"the checkpoint was trained with --{flag} {theirs[name]}, which convert does not support")
    return theirs


def number(theirs: Dict[str, Any], name: str, default: Any) -> Any:
    """One of their arguments, converted to the type of its default; None counts as the default."""
    value = theirs.get(name)
    try:
        return default if value is None else type(default)(value)
    except (TypeError, ValueError, OverflowError):
        flag = name.replace("_", "-")
        raise ConfigurationError(f"the checkpoint's --{flag} {value} is not a number; use an unchanged checkpoint") from None


def our_options(theirs: Dict[str, Any], stacks: Iterable[str]) -> MoEOptions:
    """Our options for their routing and placement."""
    routing: Dict[str, Any] = {"router": "switch", "jitter_eps": 0.0}
    if not theirs.get("moe_top1_expert"):
        routing = {
            "router": "gshard",
            "second_expert_policy": theirs.get("moe_second_expert_policy") or "sampling",
            "normalise_before_dropping": bool(theirs.get("moe_normalize_gate_prob_before_dropping")),
            "capacity_policy": "batch" if theirs.get("moe_batch_prioritized_routing") else None,
        }
    layers: Dict[str, Any] = {f"{stack}_moe_layers": _layers(theirs, stack) for stack in stacks}
    count, regularisers = number(theirs, "moe_expert_count", 0), _regularisers(theirs)
    return MoEOptions(num_experts=count, capacity_factor=1.0, **routing, **layers, **regularisers)


def _regularisers(theirs: Dict[str, Any]) -> Dict[str, Any]:
    """Our options for those of the branch nllb."""
    return {
        "moe_eom": number(theirs, "moe_eom", 0.0),
        "moe_fom": number(theirs, "moe_fom", 0.0),
        "moe_gating_dropout": number(theirs, "moe_local_drop", 0.0),
        "moe_cmr": bool(theirs.get("moe_cmr")),
        "moe_cmr_gate_dropout": number(theirs, "cmr_gate_drop", 0.0) if theirs.get("moe_cmr") else 0.0,
    }


def _layers(theirs: Dict[str, Any], stack: str) -> str:
    """The stack's layers with experts, counted from 0: in theirs, every freq-th, the last of each freq layers."""
    freq = max(number(theirs, f"{stack}_moe_freq", 0), number(theirs, "moe_freq", 0))
    layers = range(freq - 1, number(theirs, f"{stack}_layers", 0), freq) if freq > 0 else range(0)
    return ",".join(map(str, layers)) or "none"


def notes(theirs: Dict[str, Any], options: MoEOptions) -> List[str]:
    """What differs at evaluation, a sentence each."""
    found = []
    if options.router == "gshard" and options.second_expert_policy != "all":
        found.append("at evaluation the second expert is the second most probable; in the branch it is random there too")
    fraction = number(theirs, "moe_eval_capacity_token_fraction", EVAL_FRACTION)
    if fraction != 1:
        found.append(
            f"at evaluation no token is dropped, unlike with the branch's --moe-eval-capacity-token-fraction {fraction:g}"
        )
    return found


def training_flags(arch: str, options: MoEOptions) -> str:
    """The flags of our model that continues training, beside those of its sizes."""
    flags = [f"--arch {arch}"]
    for option in fields(MoEOptions):
        if getattr(options, option.name) == option.default and option.name != "router":
            continue
        value, flag = getattr(options, option.name), f"--{option.name.replace('_', '-')}"
        flags.append(flag if value is True else f"{flag} {value:g}" if isinstance(value, float) else f"{flag} {value}")
    return " ".join(flags)


def loss_weights(criterion: Any, with_cmr: bool, layers: int) -> Dict[str, float]:
    """Our criterion's options for the weights of their losses; `layers` with experts, over which ours adds up."""
    theirs = as_dict(criterion or {})
    found = {}
    if "moe_gate_loss_wt" in theirs:
        combine = theirs.get("moe_gate_loss_combine_method") or "average"
        found["moe_balance_loss_weight"] = number(theirs, "moe_gate_loss_wt", 1.0) / (1 if combine == "sum" else max(layers, 1))
    if with_cmr:
        found["moe_cmr_budget"] = number(theirs, "cmr_gate_loss_p", 1.0)
        found["moe_cmr_loss_weight"] = number(theirs, "cmr_gate_loss_wt", 0.0)
    return found


def loss_flags(weights: Dict[str, float]) -> str:
    """The flags of these options of our criterion."""
    return "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in weights.items())


def known_by(registry: Mapping[str, type], settings: Any, **more: Any) -> Any:
    """Of a task's or criterion's settings, and `more`, what the dataclass of that name in the registry knows.

    Unchanged if there is none of that name.
    """
    values = as_dict(settings)
    if values.get("_name") not in registry:
        return settings
    known = {"_name", *(option.name for option in fields(registry[values["_name"]]))}
    return {name: value for name, value in {**values, **more}.items() if name in known}
