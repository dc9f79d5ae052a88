"""The flags of a Mixture-of-Experts model, and what must hold among them before anything is built."""

import logging
from dataclasses import dataclass, field, fields
from typing import Any, Dict, Optional

from fairseq.criterions import CRITERION_REGISTRY

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.estimators import ESTIMATORS
from fairseq_sparsemixer.gates import DENSE, GATES, gate_class, gate_options

logger = logging.getLogger(__name__)


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
            "help": "switch: noise within 1 +- eps multiplies the logits; "
            "sparsemixer: masks experts such noise could not lift to the top"
        },
    )
    expert_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "dropout inside the experts (default: --activation-dropout); fine-tuning likes more, such as 0.4"},
    )
    gradient_estimator: Optional[str] = field(
        default=None,
        metadata={"help": f"what a sampling router learns from: {', '.join(ESTIMATORS)} (default: the router's own)"},
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
            "help": "seconds a rank waits for another before it ends with an error (default: torch's, 600 with nccl, 1800 with gloo)"
        },
    )
    sharded_checkpoints: bool = field(
        default=False, metadata={"help": "each rank writes its own experts, for models too large for one file"}
    )


def check_options(cfg: Any) -> None:
    """Raise ConfigurationError, naming flag, value and remedy, for options that make no model."""
    if cfg.moe_freq < 1:
        raise ConfigurationError(f"--moe-freq {cfg.moe_freq} must be at least 1; 2 puts experts in every second layer")
    if cfg.num_experts < 1:
        raise ConfigurationError(f"--num-experts {cfg.num_experts} must be at least 1")
    if cfg.router == DENSE:
        return
    if cfg.expert_dropout is not None and not 0 <= cfg.expert_dropout < 1:
        raise ConfigurationError(f"--expert-dropout {cfg.expert_dropout} must be at least 0 and less than 1")
    if getattr(cfg, "scale_fc", False):
        raise ConfigurationError("--scale-fc normalises inside feed-forward layers that are no experts; leave it out, or use --router dense")
    try:
        gate_class(cfg.router)
        options = router_options(cfg)
        gate_class(cfg.router)(1, cfg.num_experts, **options)  # a gate checks its own options
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def router_options(cfg: Any) -> Dict[str, Any]:
    """The options of cfg.router among the flags; a flag left at None keeps the router's default.

    Raises ValueError where a flag was given that this router cannot honour.
    """
    accepted = gate_options(cfg.router)
    if cfg.moe_top_k is not None and not 1 <= cfg.moe_top_k <= cfg.num_experts:
        raise ValueError(f"--moe-top-k {cfg.moe_top_k} must lie between 1 and --num-experts {cfg.num_experts}")
    if cfg.moe_top_k not in (None, 1) and "top_k" not in accepted:
        raise ValueError(f"--moe-top-k {cfg.moe_top_k} does not go with --router {cfg.router}, which gives each token one expert")
    values = {"top_k": cfg.moe_top_k, **{f.name: getattr(cfg, f.name) for f in fields(MoEOptions)}}
    return {name: values[name] for name in accepted if values.get(name) is not None}


def warn_of_plain_criterion(args: Any, router: str) -> None:
    """Warn when training with a criterion that leaves the auxiliary losses out."""
    criterion = getattr(args, "criterion", None)  # fairseq-train keeps all flags in one namespace
    with_losses = sorted(name for name, cls in CRITERION_REGISTRY.items() if hasattr(cls, "auxiliary_loss"))
    if router == DENSE or criterion is None or criterion in with_losses:
        return
    remedy = f"moe_{criterion}" if f"moe_{criterion}" in with_losses else " or ".join(with_losses)
    logger.warning(
        "--criterion %s ignores the load-balancing loss of --router %s, and experts may collapse; use --criterion %s",
        criterion, router, remedy,
    )  # fmt: skip
