"""Checks on the flags of a Mixture-of-Experts model before anything is built."""

from dataclasses import fields
from typing import Any, Dict, List

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import resolve_activation
from fairseq_sparsemixer.moe.gates import DENSE, Gate, build_gate, gate_class
from fairseq_sparsemixer.moe.gating_dropout import require_local_routing
from fairseq_sparsemixer.moe.output_masking import require_masking
from fairseq_sparsemixer.options import MoEOptions, in_flags
from fairseq_sparsemixer.plugin.models.layer_choice import (
    STACKS,
    configurations,
    has_experts,
    listed,
    of_some_layers,
    resolve_layers,
    stack_option,
)
from fairseq_sparsemixer.plugin.models.memory import refuse_too_many_experts
from fairseq_sparsemixer.plugin.models.router_options import router_options
from fairseq_sparsemixer.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, SECONDS, TOO_LARGE, Rule, broken_rule


def check_options(cfg: Any, layers: Dict[str, int]) -> None:
    """Raise ConfigurationError, naming flag, value and remedy, for invalid options; make the choice of layers explicit.

    layers: the number of layers of each stack that the model has, "encoder" and "decoder".
    """
    check_kinds(cfg)
    check_numbers(cfg)
    for stack in STACKS:
        layers_to_keep(cfg, stack)
    if cfg.router == DENSE:
        return
    check_noise(cfg)
    check_recomputation(cfg)
    if getattr(cfg, "scale_fc", False):
        raise ConfigurationError("--scale-fc normalises inside layers that experts replace; leave it out, or use --router dense")
    resolve_layers(cfg, layers)
    refuse_too_many_experts(cfg, layers)
    gates = []
    for experts, own in configurations(cfg, layers).items():
        with of_some_layers(cfg, {experts}), in_flags():
            gates.append(build_gate(cfg.router, 1, experts, **router_options(own)))  # a gate checks its options
    with in_flags():
        check_regularisers(cfg, gates)
        if cfg.expert_activation is not None:
            resolve_activation(cfg.expert_activation)
    if "decoder" in layers and has_experts(cfg, "decoder", layers["decoder"]):
        check_causal(cfg, gates)


def check_regularisers(cfg: Any, gates: List[Gate]) -> None:
    """Raise ValueError or ConfigurationError for NLLB's regularisers where a router, or their flags, do not allow them."""
    for gate in gates:
        require_masking(gate, cfg.moe_eom, cfg.moe_fom)
        require_local_routing(gate, cfg.moe_gating_dropout)
    if cfg.moe_cmr_gate_dropout and not cfg.moe_cmr:
        refuse(f"--moe-cmr-gate-dropout {cfg.moe_cmr_gate_dropout} needs --moe-cmr; add --moe-cmr, or leave it out")


def check_causal(cfg: Any, gates: List[Gate]) -> None:
    """Raise ConfigurationError for gates that an autoregressive decoder must not have, unless they are forced."""
    if cfg.force_expert_choice or all(gate.causal for gate in gates):
        return
    router = not gate_class(cfg.router).causal
    cause, instead = (
        (f"--router {cfg.router}", "use another router")
        if router
        else (f"--eval-capacity-factor {cfg.eval_capacity_factor}", "leave it out")
    )
    raise ConfigurationError(
        f"{cause} lets a token's experts depend on the rest of its batch, which an autoregressive decoder must not see;"
        f" {instead}, use --moe-encoder-only (transformer_moe), or --force-expert-choice to allow it"
    )


# None means the router's default. jitter_eps and capacity_factor may be infinite if the router allows it.
NUMBERS = {
    "moe_freq": (COUNT, "2 puts experts in every second layer"),
    "num_experts": (COUNT, ""),
    "expert_ffn_embed_dim": (COUNT, ""),
    "moe_top_k": (COUNT, ""),
    "jitter_eps": (Rule(lambda x: x >= 0, "be at least 0"), "the papers use 0.1"),
    "expert_dropout": (PROBABILITY, ""),
    "capacity_factor": (Rule(lambda x: x > 0, "be positive"), "1.25 is usual, and inf drops nothing"),
    "eval_capacity_factor": (POSITIVE, "leave it out to drop nothing at evaluation"),
    "moe_bias_update_rate": (NOT_NEGATIVE, "DeepSeek-V3 uses 0.001, and 0 disables it"),
    "router_scale": (Rule(lambda x: 0 < x < TOO_LARGE, "be positive"), "DeepSeek-V3 uses 2.5"),
    "router_groups": (COUNT, "1 means no groups"),
    "router_topk_groups": (COUNT, "leave it out for all groups"),
    "expert_lora_rank": (COUNT, "leave it out to train the experts' own weights"),
    "expert_lora_alpha": (POSITIVE, "leave it out for the rank"),
    "num_shared_experts": (Rule(lambda x: 0 <= x < TOO_LARGE, "be at least 0", whole=True), "0 means none"),
    "moe_eom": (PROBABILITY, "NLLB-200 uses 0.2"),
    "moe_fom": (PROBABILITY, "0 masks nothing"),
    "moe_gating_dropout": (PROBABILITY, "0 always exchanges tokens"),
    "moe_cmr_gate_dropout": (PROBABILITY, "0 disables it"),
    "expert_parallel_size": (COUNT, "leave it out for the largest that fits"),
    "moe_overlap": (COUNT, "1 does not overlap the exchange with the computation"),
    "moe_hierarchical_exchange": (COUNT, "leave it out for one exchange among all ranks"),
    "collective_timeout": (SECONDS, "leave it out for torch's default"),
}


TEXTS = [option.name for option in fields(MoEOptions) if "str" in str(option.type) and not option.name.endswith("_moe_layers")]
SWITCHES = [option.name for option in fields(MoEOptions) if option.type is bool]


def check_kinds(cfg: Any) -> None:
    """Raise ConfigurationError for what is no text where a flag takes text, and for text instead of true or false.

    The command line cannot give such values, but a YAML file can: 'false' would be true.
    """
    for name in TEXTS:
        value = getattr(cfg, name)
        if value is not None and not isinstance(value, str):
            refuse(f"--{name.replace('_', '-')} {value} must be text; in a YAML file, write it with quotes")
    for name in SWITCHES:
        value = getattr(cfg, name)
        if isinstance(value, str):
            refuse(f"--{name.replace('_', '-')} '{value}' must be true or false; in a YAML file, write it without quotes")


def check_numbers(cfg: Any) -> None:
    """Raise ConfigurationError for a number out of range for every router."""
    for name, (rule, remedy) in NUMBERS.items():
        value = getattr(cfg, name)
        if value is not None:
            refuse(broken_rule(f"--{name.replace('_', '-')}", value, rule, remedy))


def check_recomputation(cfg: Any) -> None:
    """Raise ConfigurationError for flags of experts' adapters and recomputation that change nothing."""
    if cfg.expert_lora_alpha is not None and cfg.expert_lora_rank is None:
        refuse(f"--expert-lora-alpha {cfg.expert_lora_alpha} scales adapters, which need --expert-lora-rank; give both")
    if cfg.checkpoint_experts:
        for name in ("checkpoint_activations", "offload_activations"):
            if getattr(cfg, name, False):
                refuse(
                    f"--checkpoint-experts does nothing under --{name.replace('_', '-')}, which runs whole layers again; leave"
                    " out one of the two"
                )


def layers_to_keep(cfg: Any, stack: str) -> List[int]:
    """The layers of the stack "encoder" or "decoder" that remain after pruning, sorted; empty if it is not pruned.

    Raises ConfigurationError for anything but layer numbers.
    """
    name = f"{stack}_layers_to_keep"
    text = listed(stack_option(cfg, stack, "layers_to_keep"))
    if not text:
        return []
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise ConfigurationError(f"--{name.replace('_', '-')} {text} must list layer numbers, each once, such as 0,2,4")
    return sorted(map(int, numbers))


def check_noise(cfg: Any) -> None:
    """Raise ConfigurationError for noise that experts do not support: dropout out of range, quantization noise."""
    for name in ("activation_dropout", "relu_dropout"):  # used by experts unless --expert-dropout is given
        dropout = Rule(lambda x: 0 <= x <= 1, "be at least 0 and at most 1")
        refuse(broken_rule(f"--{name.replace('_', '-')}", getattr(cfg, name, 0) or 0, dropout))
    for kind in ("pq", "scalar"):
        name = f"quant_noise_{kind}"
        amount = getattr(getattr(cfg, "quant_noise", None), kind, None) or getattr(cfg, name, 0)
        if amount:
            refuse(
                f"--{name.replace('_', '-')} {amount} adds noise to the weights of fairseq's own layers, but not to the"
                " experts; leave it out, or use --router dense"
            )


def refuse(sentence: str) -> None:
    """Raise ConfigurationError with the sentence, unless it is empty."""
    if sentence:
        raise ConfigurationError(sentence)
