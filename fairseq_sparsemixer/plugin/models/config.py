"""What must hold among the flags of a Mixture-of-Experts model before anything is built."""

from dataclasses import fields
from typing import Any, Dict, List

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.experts import resolve_activation
from fairseq_sparsemixer.moe.gates import DENSE, gate_class, gate_options, routers_with
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.ranges import COUNT, NOT_NEGATIVE, PROBABILITY, SECONDS, TOO_LARGE, Rule, broken_rule


def check_options(cfg: Any, autoregressive: bool = True) -> None:
    """Raise ConfigurationError, naming flag, value and remedy, for options that make no model.

    autoregressive: whether an MoE layer is to stand in a decoder that generates token by token.
    """
    check_numbers(cfg)
    for stack in ("encoder", "decoder"):
        layers_to_keep(cfg, stack)
    if cfg.router == DENSE:
        return
    check_noise(cfg)
    if getattr(cfg, "scale_fc", False):
        raise ConfigurationError("--scale-fc normalises inside layers that are experts here; leave it out, or use --router dense")
    try:
        gate_class(cfg.router)
        options = router_options(cfg)
        gate_class(cfg.router)(1, cfg.num_experts, **options)  # a gate checks its own options
        if cfg.expert_activation is not None:
            resolve_activation(cfg.expert_activation)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    if autoregressive and not gate_class(cfg.router).causal and not cfg.force_expert_choice:
        raise ConfigurationError(
            f"--router {cfg.router} lets a token's experts depend on tokens after it, which an autoregressive decoder must"
            " not see; in transformer_moe use --moe-encoder-only, else another router, or --force-expert-choice to insist"
        )


# None stands for the router's default. jitter_eps and capacity_factor may be infinite, where the router allows it.
NUMBERS = {
    "moe_freq": (COUNT, "2 puts experts in every second layer"),
    "num_experts": (COUNT, ""),
    "moe_top_k": (COUNT, ""),
    "jitter_eps": (Rule(lambda x: x >= 0, "be at least 0"), "the papers use 0.1"),
    "expert_dropout": (PROBABILITY, ""),
    "capacity_factor": (Rule(lambda x: x > 0, "be positive"), "1.25 is usual, and inf drops nothing"),
    "moe_bias_update_rate": (NOT_NEGATIVE, "DeepSeek-V3 uses 0.001, and 0 switches it off"),
    "num_shared_experts": (Rule(lambda x: 0 <= x < TOO_LARGE, "be at least 0", whole=True), "0 means none"),
    "expert_parallel_size": (COUNT, "leave it out for the largest that fits"),
    "collective_timeout": (SECONDS, "leave it out for torch's default"),
}


def check_numbers(cfg: Any) -> None:
    """Raise ConfigurationError for a number out of range, whatever the router."""
    for name, (rule, remedy) in NUMBERS.items():
        value = getattr(cfg, name)
        if value is not None:
            refuse(broken_rule(f"--{name.replace('_', '-')}", value, rule, remedy))


def layers_to_keep(cfg: Any, stack: str) -> List[int]:
    """The layers of a trained model's "encoder" or "decoder" that a pruned one has, in order; empty where none is pruned.

    Raises ConfigurationError for anything but layers by number.
    """
    name = f"{stack}_layers_to_keep"
    given = getattr(getattr(cfg, stack, None), "layers_to_keep", None) or getattr(cfg, name, None)
    if not given:
        return []
    numbers = given.split(",") if isinstance(given, str) else [""]
    if not all(number.strip().isdecimal() for number in numbers) or len(set(map(int, numbers))) < len(numbers):
        raise ConfigurationError(f"--{name.replace('_', '-')} {given} must name layers by number, each once, such as 0,2,4")
    return sorted(map(int, numbers))


def check_noise(cfg: Any) -> None:
    """Raise ConfigurationError for fairseq's noise where experts cannot take it: dropout out of range, noise of quantization."""
    for name in ("activation_dropout", "relu_dropout"):  # an expert's unless --expert-dropout is given
        dropout = Rule(lambda x: 0 <= x <= 1, "be at least 0 and at most 1")
        refuse(broken_rule(f"--{name.replace('_', '-')}", getattr(cfg, name, 0) or 0, dropout))
    for kind in ("pq", "scalar"):
        name = f"quant_noise_{kind}"
        amount = getattr(getattr(cfg, "quant_noise", None), kind, None) or getattr(cfg, name, 0)
        if amount:
            refuse(
                f"--{name.replace('_', '-')} {amount} puts noise on the weights of fairseq's own layers, and would leave the"
                " experts without; leave it out, or use --router dense"
            )


def refuse(sentence: str) -> None:
    """Raise ConfigurationError, unless the sentence is empty."""
    if sentence:
        raise ConfigurationError(sentence)


FLAG_OF_OPTION = {"top_k": "moe_top_k", "bias_update_rate": "moe_bias_update_rate"}  # where a flag has a longer name


def router_options(cfg: Any) -> Dict[str, Any]:
    """The options of cfg.router among the flags; a flag left at its default keeps the router's default.

    Raises ValueError where a flag was given that this router cannot honour, listing the routers that can.
    """
    if cfg.moe_top_k is not None and not 1 <= cfg.moe_top_k <= cfg.num_experts:
        raise ValueError(f"--moe-top-k {cfg.moe_top_k} must lie between 1 and --num-experts {cfg.num_experts}")
    accepted = gate_options(cfg.router)
    defaults = {option.name: option.default for option in fields(MoEOptions)}
    chosen = {}
    for option in (
        "top_k",
        "jitter_eps",
        "gradient_estimator",
        "estimator_at_argmax",
        "capacity_factor",
        "bias_update_rate",
        "router_bias",
    ):
        flag = FLAG_OF_OPTION.get(option, option)
        value = getattr(cfg, flag)
        if option in accepted:
            if value is not None:
                chosen[option] = value
        elif value != defaults[flag] and not (option == "top_k" and value == gate_class(cfg.router).top_k):
            raise ValueError(_refusal(flag, value, cfg.router, option))
    return chosen


def _refusal(flag: str, value: Any, router: str, option: str) -> str:
    why = {
        "top_k": f"which gives each token {gate_class(router).top_k}",
        "gradient_estimator": "which does not sample experts",
        "estimator_at_argmax": "which does not sample experts",
        "bias_update_rate": "whose selection takes no bias",
        "capacity_factor": "which drops nothing",
        "router_bias": "whose logits take no bias",
    }.get(option, "which has no use for it")
    others = ", ".join(routers_with(option))
    return f"--{flag.replace('_', '-')} {value} does not go with --router {router}, {why}; the routers that take it: {others}"
