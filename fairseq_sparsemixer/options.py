"""The flags of a Mixture-of-Experts model. Imports neither torch nor fairseq, so that `--help` and completion stay fast."""

import re
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any, Dict, Iterator, Optional

from fairseq_sparsemixer.errors import ConfigurationError

# must match the registrations in moe/gates, moe/estimators.py and moe/experts.py
ROUTERS = (
    "dense, base, default_moe, dense_st, expert_choice, expert_threshold, gshard, hash, noisy_topk, remoe,"
    " round_robin, sinkhorn, sparsemixer, sparsemixer_v2, switch, topk"
)
ESTIMATORS = "switch, euler, midpoint, heun3, inf"
ACTIVATIONS = "relu, gelu, silu, geglu, swiglu"


@dataclass
class MoEOptions:
    """Mixin for a model's dataclass: one field per flag, documented by its help text.

    A field with `option` in its metadata is passed to the router under that name; `refusal` says why a router rejects it.
    """

    router: str = field(
        default="sparsemixer",
        metadata={"help": f"router: {ROUTERS} (dense: no experts, the baseline)"},
    )
    num_experts: int = field(default=8, metadata={"help": "experts per MoE layer"})
    moe_freq: int = field(
        default=2,
        metadata={
            "help": "place an MoE layer every N layers, starting with the first (1: every layer); --encoder-moe-layers and"
            " --decoder-moe-layers choose layers one by one"
        },
    )
    encoder_moe_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "encoder layers with experts, counted from 0: 1,3,5, or with their own number of experts 1:8,3:16; all, none,"
            " last:4, every:2 or every:2:1 (every second, from layer 1 on); default: by --moe-freq"
        },
    )
    decoder_moe_layers: Optional[str] = field(
        default=None, metadata={"help": "decoder layers with experts, as --encoder-moe-layers"}
    )
    expert_ffn_embed_dim: Optional[int] = field(
        default=None, metadata={"help": "hidden size of an expert (default: that of the stack's feed-forward layers)"}
    )
    moe_top_k: Optional[int] = field(
        default=None,
        metadata={
            "option": "top_k",
            "help": "experts per token, for routers with a variable k (default: set by the router)",
        },
    )
    jitter_eps: float = field(
        default=0.1,
        metadata={
            "option": "jitter_eps",
            "help": "switch: multiply the logits by uniform noise in [1 - eps, 1 + eps] (0: no noise); sparsemixer,"
            " sparsemixer_v2: mask experts that such noise could not make the arg-max (0: all but one; inf: none)",
        },
    )
    expert_dropout: Optional[float] = field(
        default=None,
        metadata={"help": "dropout inside the experts (default: --activation-dropout); use more for fine-tuning, such as 0.4"},
    )
    gradient_estimator: Optional[str] = field(
        default=None,
        metadata={
            "option": "gradient_estimator",
            "refusal": "which does not sample experts",
            "help": f"router gradient estimator of a sampling router: {ESTIMATORS} (default: midpoint for sparsemixer, heun3"
            " for sparsemixer_v2; other routers take none)",
        },
    )
    estimator_at_argmax: bool = field(
        default=False,
        metadata={
            "option": "estimator_at_argmax",
            "refusal": "which does not sample experts",
            "help": "also use the gradient estimator for the most probable expert, where SparseMixer's papers use a first-order"
            " estimate (for routers with --gradient-estimator)",
        },
    )
    capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "option": "capacity_factor",
            "refusal": "which drops nothing",
            "help": "max tokens per expert as a multiple of k * tokens / E; overflow skips the layer; training only (default: no"
            " limit, but 1 for gshard; inf: no limit. expert_choice: mean experts per token, default 2, at inference too)",
        },
    )
    eval_capacity_factor: Optional[float] = field(
        default=None,
        metadata={
            "option": "eval_capacity_factor",
            "refusal": "which drops nothing at evaluation",
            "help": "--capacity-factor at evaluation and inference (default: no limit); a token's output then depends on its"
            " batch, so decoders refuse it without --force-expert-choice. fairseq's --moe-eval-capacity-token-fraction"
            " f is f * E / k",
        },
    )
    capacity_policy: Optional[str] = field(
        default=None,
        metadata={
            "option": "capacity_policy",
            "help": "which tokens an expert drops beyond its capacity: position (the last of the batch, second choices first),"
            " probability (those with the smallest weights), batch (as position, but tokens are ordered by their largest routing"
            " probability, as in V-MoE and fairseq's --moe-batch-prioritized-routing) (default: position)",
        },
    )
    second_expert_policy: Optional[str] = field(
        default=None,
        metadata={
            "option": "second_expert_policy",
            "help": "gshard: a token's second expert in training: sampling (in proportion to its probability), all (the second"
            " most probable), random (the same, kept with probability min(1, 2 * its weight)) (default: sampling)",
        },
    )
    normalise_before_dropping: bool = field(
        default=False,
        metadata={
            "option": "normalise_before_dropping",
            "help": "gshard: the two weights sum to 1 before choices are dropped, instead of those that remain after",
        },
    )
    moe_bias_update_rate: float = field(
        default=0.0,
        metadata={
            "option": "bias_update_rate",
            "refusal": "whose selection takes no bias",
            "help": "balance load by a per-expert bias on the logits, used for selection only and moved by this step after each"
            " update (DeepSeek-V3: 0.001; 0: off); use with --moe-balance-loss-weight 0",
        },
    )
    router_bias: bool = field(
        default=False,
        metadata={
            "option": "router_bias",
            "refusal": "whose logits take no bias",
            "help": "add a learned bias to the router's projection, as microsoft/SparseMixer's example does",
        },
    )
    router_score: Optional[str] = field(
        default=None,
        metadata={
            "option": "router_score",
            "help": "topk: a token's scores are the softmax or the sigmoid of its logits: softmax, sigmoid (default: softmax)",
        },
    )
    router_weights: Optional[str] = field(
        default=None,
        metadata={
            "option": "router_weights",
            "help": "topk: combine weights are the scores, normalised to sum to 1 or raw: normalised, raw (default: normalised)",
        },
    )
    router_scale: Optional[float] = field(
        default=None,
        metadata={"option": "router_scale", "help": "topk: multiply the combine weights (default: 1; DeepSeek-V3: 2.5)"},
    )
    router_groups: Optional[int] = field(
        default=None,
        metadata={
            "option": "router_groups",
            "help": "topk: groups of experts; a token's are in the --router-topk-groups best (default: 1; DeepSeek-V3: 8)",
        },
    )
    router_topk_groups: Optional[int] = field(
        default=None,
        metadata={
            "option": "router_topk_groups",
            "help": "topk: groups a token's experts may be in (default: all; DeepSeek-V3: 4)",
        },
    )
    router_option: Optional[str] = field(
        default=None,
        metadata={
            "help": "options of a router without a flag of their own, NAME=VALUE[,NAME=VALUE...], passed to its constructor"
        },
    )
    num_shared_experts: int = field(
        default=0, metadata={"help": "shared experts per MoE layer: run on every token, in addition to the routed experts"}
    )
    moe_eom: float = field(
        default=0.0,
        metadata={
            "help": "expert output masking: in training, zero an expert's output for a token with this probability; at inference,"
            " scale the experts' outputs by 1 minus it (NLLB-200: 0.2)"
        },
    )
    moe_fom: float = field(
        default=0.0,
        metadata={
            "help": "final output masking: in training, zero an MoE layer's output for a token with this probability; at"
            " inference, scale it by 1 minus it"
        },
    )
    moe_gating_dropout: float = field(
        default=0.0,
        metadata={
            "help": "gating dropout: the probability that a training batch goes to the experts of its own rank, without"
            " all-to-all; one coin per batch for all ranks and layers; no effect if every rank holds all experts"
        },
    )
    moe_cmr: bool = field(
        default=False,
        metadata={
            "help": "conditional MoE routing: a shared feed-forward network in each MoE layer, and a gate in (0, 1) that mixes"
            " both for each token; bounded by --moe-cmr-budget"
        },
    )
    moe_cmr_gate_dropout: float = field(
        default=0.0, metadata={"help": "dropout of --moe-cmr's gate: a token whose gate is dropped gets the shared network only"}
    )
    expert_activation: Optional[str] = field(
        default=None,
        metadata={
            "help": f"activation of the experts: {ACTIVATIONS} (default: --activation-fn);"
            " gated activations use three weight matrices instead of two"
        },
    )
    expert_lora_rank: Optional[int] = field(
        default=None,
        metadata={
            "help": "train low-rank adapters of this rank for each expert (LoRA), whose own weights and biases stay as they are;"
            " --freeze for all else. A checkpoint without adapters can be loaded; `convert --merge-lora` merges them"
        },
    )
    expert_lora_alpha: Optional[float] = field(
        default=None,
        metadata={"help": "multiply the product of an adapter by this, divided by --expert-lora-rank (default: the rank)"},
    )
    checkpoint_experts: bool = field(
        default=False,
        metadata={
            "help": "trade time for memory: run the experts, but neither router nor exchange, again in the backward pass;"
            " --checkpoint-activations does so for whole layers"
        },
    )
    force_expert_choice: bool = field(
        default=False,
        metadata={
            "help": "allow routing by batch in a decoder, future tokens included: expert_choice, round_robin,"
            " --eval-capacity-factor"
        },
    )
    freeze: Optional[str] = field(
        default=None,
        metadata={
            "help": "parameters that are not trained: those in whose names one of these regular expressions is found, such as"
            " '\\.gate\\.' or 'embed_tokens,\\.experts\\.'; also the states of gates so named. Frozen gates keep their noise, but"
            " have no balance loss"
        },
    )
    expert_parallel_size: Optional[int] = field(
        default=None,
        metadata={
            "help": "number of ranks that share one set of experts"
            " (default: greatest common divisor of ranks and experts; 1: all experts on every rank)"
        },
    )
    shard_expert_optimizer: bool = field(
        default=False,
        metadata={
            "help": "shard the optimizer state of experts over the ranks with replicas of them: each updates a slice and sends it"
            " to the others (ZeRO-1); no effect if each expert is on one rank only"
        },
    )
    moe_overlap: int = field(
        default=1,
        metadata={
            "help": "exchange the tokens of a layer in N chunks, so that the all-to-all of one chunk overlaps the experts'"
            " computation of another (1: no overlap); no effect if every rank holds all experts"
        },
    )
    moe_hierarchical_exchange: Optional[int] = field(
        default=None,
        metadata={
            "help": "ranks per node: exchange tokens inside nodes first, then between them, in fewer and larger messages, where a"
            " group of --expert-parallel-size ranks spans several nodes (default: one exchange among all its ranks)"
        },
    )
    balance_scope: str = field(
        default="local",
        metadata={
            "help": "tokens of one load-balancing loss: those of each sequence (sequence), of a rank's batch (local), of all"
            " ranks' batches (global), or of the whole update, over ranks and --update-freq (update: one more forward pass, if"
            " --update-freq is above 1)"
        },
    )
    record_a2a_perf_stats: bool = field(
        default=False, metadata={"help": "log the time in all-to-alls per update, in milliseconds"}
    )
    collective_timeout: Optional[float] = field(
        default=None,
        metadata={
            "help": "seconds a rank waits in a collective before it exits with an error (default: 600 for nccl, 1800 for gloo)"
        },
    )
    sharded_checkpoints: bool = field(
        default=False,
        metadata={"help": "write one checkpoint file per rank, each with its own experts, for models too large for one file"},
    )


@dataclass
class TraceOptions:
    """Flags of fairseq-train, -validate, -generate, -interactive and -eval-lm, beside those that all of them have."""

    moe_trace: Optional[str] = field(
        default=None,
        metadata={
            "help": "write the experts and weights of each word in each MoE layer to this file, as JSON lines (.gz: compressed);"
            " generation: of the source and the best hypothesis"
        },
    )
    moe_trace_interval: int = field(
        default=100,
        metadata={"help": "fairseq-train: trace the batches of every N-th update (0: only validation) with --moe-trace"},
    )
    moe_replay: Optional[str] = field(
        default=None, metadata={"help": "route by this file of --moe-trace instead of the routers' own choice"}
    )
    moe_replay_weights: str = field(
        default="trace",
        metadata={
            "help": "the experts' weights with --moe-replay: trace, or model: the router's own for these experts, with gradients"
        },
    )


def moe_option(model: Any, name: str) -> Any:
    """The value of a field of MoEOptions in a model's settings; its default for a model that lacks the flag."""
    return getattr(model, name, getattr(MoEOptions, name))


# router option -> the field of the flag that sets it
FIELDS: Dict[str, Field] = {flag.metadata["option"]: flag for flag in fields(MoEOptions) if "option" in flag.metadata}
FLAGS = {  # parameter name in the core -> flag
    **{flag.name: f"--{flag.name.replace('_', '-')}" for flag in fields(MoEOptions)},
    **{option: f"--{flag.name.replace('_', '-')}" for option, flag in FIELDS.items()},
    "activation": "--expert-activation",
    "eom": "--moe-eom",
    "fom": "--moe-fom",
    "gating_dropout": "--moe-gating-dropout",
    "chunks": "--moe-overlap",
    "ranks_per_node": "--moe-hierarchical-exchange",
}
NAMED = re.compile(rf"\b({'|'.join(FLAGS)})=(?=\S)")


@contextmanager
def in_flags() -> Iterator[None]:
    """Turn the core's ValueErrors into ConfigurationErrors: `num_experts=0 must ...` becomes `--num-experts 0 must ...`."""
    try:
        yield
    except ConfigurationError:
        raise
    except ValueError as error:
        raise ConfigurationError(NAMED.sub(lambda match: f"{FLAGS[match[1]]} ", str(error))) from None
