"""The flags of a Mixture-of-Experts model, and what must hold among them before anything is built."""

from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.estimators import ESTIMATORS
from fairseq_sparsemixer.experts import ACTIVATIONS, GATED_ACTIVATIONS, resolve_activation
from fairseq_sparsemixer.gates import DENSE, GATES, gate_class, gate_options, routers_with
from fairseq_sparsemixer.ranges import COUNT, NOT_NEGATIVE, PROBABILITY, SECONDS, TOO_LARGE, Rule, broken_rule


@dataclass
class MoEOptions:
    """Mixed into a model's dataclass: one field a flag, its help text the documentation."""

    router: str = field(
        default="sparsemixer",
        metadata={"help": f"how tokens choose experts: {', '.join([DENSE, *sorted(GATES)])} ({DENSE}: no experts, the baseline)"},
    )
    num_experts: int = field(default=8, metadata={"help": "number of experts in each MoE layer"})
    moe_freq: int = field(
        default=2, metadata={"help": "every n-th layer is an MoE layer, starting at the first (1: all of them)"}
    )
    moe_top_k: Optional[int] = field(
        default=None, metadata={"help": "experts for each token, for routers that can choose it (default: the router's)"}
    )
    jitter_eps: float = field(
        default=0.1,
        metadata={
            "help": "switch: noise within 1 +- eps multiplies the logits (0: no noise); sparsemixer, sparsemixer_v2: masks"
            " experts that such noise could not lift to the top (0: all but one; inf: none)"
        },
    )
    expert_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "dropout inside the experts (default: --activation-dropout); fine-tuning likes more, such as 0.4"},
    )
    gradient_estimator: Optional[str] = field(
        default=None,
        metadata={
            "help": f"what a sampling router learns from: {', '.join(ESTIMATORS)} (default: midpoint for sparsemixer, heun3 for"
            " sparsemixer_v2; other routers do not sample experts, and take none)"
        },
    )
    estimator_at_argmax: bool = field(
        default=False,
        metadata={
            "help": "use the gradient estimator for the most probable expert, too, which SparseMixer's papers estimate to first"
            " order (for routers with --gradient-estimator)"
        },
    )
    capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "help": "in training an expert takes at most this many times its fair share of the tokens, and the rest keep the"
            " residual alone; never at inference (default: no limit, but 1 for gshard; inf lifts it. For expert_choice: the"
            " experts of a token on average, default 2, at inference too)"
        },
    )
    moe_bias_update_rate: float = field(
        default=0.0,
        metadata={
            "help": "balance by a bias on each expert's logit, in selection only, moved by this much after each update"
            " (DeepSeek-V3: 0.001; 0: off). Goes with --moe-balance-loss-weight 0"
        },
    )
    router_bias: bool = field(
        default=False,
        metadata={"help": "give the router's projection a learned bias, as microsoft/SparseMixer's example does"},
    )
    num_shared_experts: int = field(
        default=0, metadata={"help": "experts of each MoE layer that run on every token, beside those the router chooses"}
    )
    expert_activation: Optional[str] = field(
        default=None,
        metadata={
            "help": f"the experts' activation: {', '.join([*ACTIVATIONS, *GATED_ACTIVATIONS])} (default: --activation-fn);"
            " the gated ones have three weight matrices instead of two"
        },
    )
    force_expert_choice: bool = field(
        default=False,
        metadata={"help": "let --router expert_choice route in a decoder, where its choice depends on tokens still to come"},
    )
    expert_parallel_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "ranks that share one set of experts "
            "(default: the largest divisor of ranks and experts; 1: all on every rank)"
        },
    )
    balance_scope: str = field(
        default="local",
        metadata={"help": "whose tokens the load-balancing loss is about: those of each rank (local), or of all (global)"},
    )
    record_a2a_perf_stats: bool = field(
        default=False, metadata={"help": "log the milliseconds that this rank spends in all-to-alls in each update"}
    )
    collective_timeout: Optional[float] = field(
        default=None,
        metadata={
            "help": "seconds a rank waits for another before it ends with an error (default: 600 with nccl, 1800 with gloo)"
        },
    )
    sharded_checkpoints: bool = field(
        default=False, metadata={"help": "each rank writes its own experts, for models too large for one file"}
    )


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
