"""The flags of a Mixture-of-Experts model. Loads neither torch nor fairseq: `--help` and completion read them, too."""

import re
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Dict, Iterator, Optional

from fairseq_sparsemixer.errors import ConfigurationError

# as registered in moe/gates, moe/estimators.py and moe/experts.py
ROUTERS = "dense, base, dense_st, expert_choice, gshard, hash, noisy_topk, sinkhorn, sparsemixer, sparsemixer_v2, switch"
ESTIMATORS = "switch, euler, midpoint, heun3, inf"
ACTIVATIONS = "relu, gelu, silu, geglu, swiglu"


@dataclass
class MoEOptions:
    """Mixed into a model's dataclass: one field a flag, its help text the documentation.

    A field with the metadata `option` is handed to the router under that name; `refusal` says why a router may take none.
    """

    router: str = field(
        default="sparsemixer",
        metadata={"help": f"how tokens choose experts: {ROUTERS} (dense: no experts, the baseline)"},
    )
    num_experts: int = field(default=8, metadata={"help": "number of experts in each MoE layer"})
    moe_freq: int = field(
        default=2, metadata={"help": "every n-th layer is an MoE layer, starting at the first (1: all of them)"}
    )
    moe_top_k: Optional[int] = field(
        default=None,
        metadata={
            "option": "top_k",
            "help": "experts for each token, for routers that can choose it (default: the router's)",
        },
    )
    jitter_eps: float = field(
        default=0.1,
        metadata={
            "option": "jitter_eps",
            "help": "switch: noise within 1 +- eps multiplies the logits (0: no noise); sparsemixer, sparsemixer_v2: masks"
            " experts that such noise could not lift to the top (0: all but one; inf: none)",
        },
    )
    expert_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "dropout inside the experts (default: --activation-dropout); fine-tuning likes more, such as 0.4"},
    )
    gradient_estimator: Optional[str] = field(
        default=None,
        metadata={
            "option": "gradient_estimator",
            "refusal": "which does not sample experts",
            "help": f"what a sampling router learns from: {ESTIMATORS} (default: midpoint for sparsemixer, heun3 for"
            " sparsemixer_v2; other routers do not sample experts, and take none)",
        },
    )
    estimator_at_argmax: bool = field(
        default=False,
        metadata={
            "option": "estimator_at_argmax",
            "refusal": "which does not sample experts",
            "help": "use the gradient estimator for the most probable expert, too, which SparseMixer's papers estimate to first"
            " order (for routers with --gradient-estimator)",
        },
    )
    capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "option": "capacity_factor",
            "refusal": "which drops nothing",
            "help": "in training an expert takes at most this many times its fair share of the tokens, and the rest keep the"
            " residual alone; never at inference (default: no limit, but 1 for gshard; inf lifts it. For expert_choice: the"
            " experts of a token on average, default 2, at inference too)",
        },
    )
    moe_bias_update_rate: float = field(
        default=0.0,
        metadata={
            "option": "bias_update_rate",
            "refusal": "whose selection takes no bias",
            "help": "balance by a bias on each expert's logit, in selection only, moved by this much after each update"
            " (DeepSeek-V3: 0.001; 0: off). Goes with --moe-balance-loss-weight 0",
        },
    )
    router_bias: bool = field(
        default=False,
        metadata={
            "option": "router_bias",
            "refusal": "whose logits take no bias",
            "help": "give the router's projection a learned bias, as microsoft/SparseMixer's example does",
        },
    )
    router_option: Optional[str] = field(
        default=None,
        metadata={
            "help": "further options of the router, as NAME=VALUE,NAME=VALUE: what the constructor of a router of your own takes"
        },
    )
    num_shared_experts: int = field(
        default=0, metadata={"help": "experts of each MoE layer that run on every token, beside those the router chooses"}
    )
    expert_activation: Optional[str] = field(
        default=None,
        metadata={
            "help": f"the experts' activation: {ACTIVATIONS} (default: --activation-fn);"
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


# by the name of the router's option, the field of the flag that sets it
FIELDS: Dict[str, Field] = {flag.metadata["option"]: flag for flag in fields(MoEOptions) if "option" in flag.metadata}
FLAGS = {  # by the names that the core knows them by
    **{flag.name: f"--{flag.name.replace('_', '-')}" for flag in fields(MoEOptions)},
    **{option: f"--{flag.name.replace('_', '-')}" for option, flag in FIELDS.items()},
    "activation": "--expert-activation",
}
NAMED = re.compile(rf"\b({'|'.join(FLAGS)})=(?=\S)")


@contextmanager
def in_flags() -> Iterator[None]:
    """The core's ValueErrors as ConfigurationErrors: `num_experts=0 must ...` becomes `--num-experts 0 must ...`."""
    try:
        yield
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(NAMED.sub(lambda match: f"{FLAGS[match[1]]} ", str(error))) from None
