"""NllbMoe of transformers: fairseq's pre-norm transformer with the experts of fairseq's branch nllb.

Of a stack, layers N, 2N, ... (counted from 1) have experts, all of them the same number E. A token has the two most probable
experts, with weights that sum to 1; the limit of an expert's tokens is all tokens at evaluation.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Dict, Set, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.names import EXPERTS, FIRST_WEIGHT, GATE, LAYER
from fairseq_sparsemixer.plugin.models.layer_choice import STACKS
from fairseq_sparsemixer.tools.export.fairseq_transformer import FEED_FORWARD, attention, layer_modules
from fairseq_sparsemixer.tools.export.source import Lazy, Source, as_is, made, refuse

CLASS = "NllbMoe"
TWO = "whose tokens have their two most probable experts, weighted by softmax, with a sum of 1: gshard, or topk with two"
TOPK: Dict[str, Tuple[Any, ...]] = {
    "moe_top_k": (None, 2),
    "router_score": (None, "softmax"),
    "router_weights": (None, "normalised"),
    "router_scale": (None, 1),
}
ANY_ROUTER: Dict[str, Tuple[Tuple[Any, ...], str]] = {  # settings of ours that change the outputs, and their values that do not
    "moe_cmr": ((False,), "which has no dense layer beside the experts"),
    "num_shared_experts": ((0,), "which has no shared experts"),
    "moe_bias_update_rate": ((0,), "whose choice of experts has no bias"),
    "eval_capacity_factor": ((None,), "which is exported without a limit at evaluation"),
}
NAMES = {
    **dict(zip(attention("encoder_attn"), attention("cross_attention"))),
    "encoder_attn_layer_norm": "cross_attention_layer_norm",
    "final_layer_norm": "ff_layer_norm",
    "fc1": "ffn.fc1",
    "fc2": "ffn.fc2",
}


def refuse_router(source: Source) -> None:
    """Raise ConfigurationError, naming the flag, for routing that NllbMoe does not have."""
    args, router = source.args, source.router
    if router not in ("gshard", "topk"):
        raise refuse("router", router, CLASS, TWO)
    for name, allowed in TOPK.items() if router == "topk" else ():
        if getattr(args, name) not in allowed:
            raise refuse(name, getattr(args, name), CLASS, TWO)
    groups = args.router_groups or 1
    if (args.router_topk_groups or groups) != groups:
        raise refuse("router_topk_groups", args.router_topk_groups, CLASS, "which has no groups of experts")
    for name, (allowed, why) in ANY_ROUTER.items():
        if getattr(args, name) not in allowed:
            raise refuse(name, getattr(args, name), CLASS, why)
    own = args.expert_activation
    if own not in (None, args.activation_fn):
        raise refuse("expert_activation", own, CLASS, f"whose experts use --activation-fn, which is {args.activation_fn}")


@dataclass
class Placement:
    """num_experts: E of each layer. sparse: the layers with experts of each stack. steps: N of each stack, 0 without experts.
    widths: the hidden size of each stack's feed-forward layers, experts or not.
    """

    num_experts: int
    sparse: Dict[str, Set[int]]
    steps: Dict[str, int]
    widths: Dict[str, int]


def place_experts(source: Source, cfg: Any, dense_as_experts: bool) -> Placement:
    """Where the model has experts, as NllbMoe counts. dense_as_experts: see _step.

    Raises ConfigurationError, naming the flag, for what NllbMoe does not have.
    """
    refuse_router(source)
    weights, counts, sparse, steps, widths = source.weights.left, {}, {}, {}, {}
    for stack in STACKS:
        layers = range(getattr(cfg, stack).layers)
        first = {index: weights.get(f"{stack}.layers.{index}{LAYER}{FIRST_WEIGHT}") for index in layers}  # [E, M, H]
        shapes = {index: weight.shape for index, weight in first.items() if weight is not None}
        sparse[stack] = set(shapes)
        counts.update({f"{stack} {index}": shape[0] for index, shape in shapes.items()})
        dense = {_dense_width(weights, stack, index) for index in layers if index not in shapes}
        widths[stack] = _one_width(source, stack, {shape[2] for shape in shapes.values()} | dense)
        steps[stack] = _step(stack, sparse[stack], len(layers), dense_as_experts)
    if len(set(counts.values())) > 1:
        stack = next(name for name, count in counts.items() if count != source.args.num_experts).split()[0]
        given = getattr(source.args, f"{stack}_moe_layers")
        raise refuse(f"{stack}_moe_layers", given, CLASS, "which has the same number of experts in all layers")
    return Placement(next(iter(counts.values())), sparse, steps, widths)


def _dense_width(weights: Dict[str, Tensor], stack: str, index: int) -> int:
    name = f"{stack}.layers.{index}.fc1.weight"
    return weights[name].size(0) if name in weights else 0


def _one_width(source: Source, stack: str, widths: Set[int]) -> int:
    if len(widths) > 1:
        value = source.args.expert_ffn_embed_dim
        raise refuse("expert_ffn_embed_dim", value, CLASS, f"whose experts are as wide as the {stack}'s other layers")
    return widths.pop()


def _step(stack: str, sparse: Set[int], count: int, dense_as_experts: bool) -> int:
    """N for the layers `sparse` of `count`; dense_as_experts: the largest N that reaches them all, and others too.

    Raises ConfigurationError if no N gives exactly these layers, unless dense_as_experts.
    """
    if not sparse:
        return 0
    step = math.gcd(*(index + 1 for index in sparse))
    if dense_as_experts or len(sparse) == count // step:
        return step
    numbers = ",".join(map(str, sorted(sparse)))
    raise ConfigurationError(
        f"--moe-freq or --{stack}-moe-layers gives experts to layers {numbers} of {count} in the {stack}, but in {CLASS} of"
        " transformers the last of every N layers has them; --dense-as-experts copies the dense layers in between into experts"
    )


def expert_config(source: Source, placement: Placement) -> Dict[str, Any]:
    """The settings of NllbMoe beside those of M2M100."""
    return {
        **{f"{stack}_ffn_dim": width for stack, width in placement.widths.items()},
        **{f"{stack}_sparse_step": step for stack, step in placement.steps.items()},
        "model_type": "nllb-moe",
        "num_experts": placement.num_experts,
        "router_bias": bool(source.args.router_bias),
        "router_dtype": "float32",
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": bool(source.args.normalise_before_dropping),
        "batch_prioritized_routing": source.args.capacity_policy == "batch",
        "moe_eval_capacity_token_fraction": 1.0,
        "moe_token_dropout": 0.0,
    }


def expert_layers(source: Source, placement: Placement, stack: str, count: int) -> Dict[str, Lazy]:
    """The tensors of the `count` layers of a stack."""
    tensors: Dict[str, Lazy] = {}
    step = placement.steps[stack]
    for index in range(count):
        ours, theirs = f"{stack}.layers.{index}.", f"model.{stack}.layers.{index}."
        tensors.update(source.weights.move(layer_modules(stack), ours, theirs, NAMES))
        if index in placement.sparse[stack]:
            tensors.update(_experts(source, ours, theirs, placement.num_experts))
        elif step and (index + 1) % step == 0:
            tensors.update(_equal_experts(source, ours, theirs, placement.num_experts))
        else:
            tensors.update(source.weights.move(FEED_FORWARD, ours, theirs, NAMES))
    return tensors


def _experts(source: Source, ours: str, theirs: str, count: int) -> Dict[str, Lazy]:
    """The router and the experts of a layer: [M, H] of an expert -> fc1.weight [H, M], and [H, M] -> fc2.weight [M, H]."""
    layer = f"{ours[:-1]}{LAYER}"
    stacks = {
        "fc1.weight": source.weights.take(f"{layer}{EXPERTS}weight_in"),
        "fc1.bias": source.weights.take(f"{layer}{EXPERTS}bias_in"),
        "fc2.weight": source.weights.take(f"{layer}{EXPERTS}weight_out"),
        "fc2.bias": source.weights.take(f"{layer}{EXPERTS}bias_out"),
    }
    gate = f"{ours}fc1{GATE}projection."
    router = {part: source.weights.take(gate + part) for part in ("weight", *(("bias",) if source.args.router_bias else ()))}
    tensors = {f"{theirs}ffn.router.classifier.{part}": as_is(tensor) for part, tensor in router.items()}
    kept = (1 - source.args.moe_eom) * (1 - source.args.moe_fom)  # at inference; moe_token_dropout has no part for FOM
    for expert in range(count):
        for part, stack in stacks.items():
            one = stack[expert]
            tensors[f"{theirs}ffn.experts.expert_{expert}.{part}"] = made(
                partial(_transposed, one, kept if part.startswith("fc2") else 1.0), one.shape, one.dtype
            )
    return tensors


def _transposed(tensor: Tensor, scale: float) -> Tensor:
    """A matrix transposed, a vector copied, in memory of its own, times scale."""
    return tensor.t().clone(memory_format=torch.contiguous_format).mul_(scale)


def _equal_experts(source: Source, ours: str, theirs: str, count: int) -> Dict[str, Lazy]:
    """A dense layer as `count` experts that are all the same, behind a router without preference: the outputs are the same."""
    dense = {f"{m}.{part}": source.weights.take(f"{ours}{m}.{part}") for m in FEED_FORWARD for part in ("weight", "bias")}
    first = dense["fc1.weight"]
    shapes = {"weight": (count, first.size(1)), "bias": (count,)}
    tensors = {}
    for part in ("weight", *(("bias",) if source.args.router_bias else ())):
        zeros = partial(torch.zeros, shapes[part], dtype=first.dtype)
        tensors[f"{theirs}ffn.router.classifier.{part}"] = made(zeros, shapes[part], first.dtype)
    for expert in range(count):
        for part, tensor in dense.items():
            tensors[f"{theirs}ffn.experts.expert_{expert}.{part}"] = made(tensor.clone, tensor.shape, tensor.dtype)
    return tensors
