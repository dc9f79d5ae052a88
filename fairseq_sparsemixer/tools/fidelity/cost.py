"""The training cost of a method: the time of one forward and backward pass of a production layer."""

import time
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.layer import MoELayer, build_moe_layer
from fairseq_sparsemixer.tools.fidelity.methods import Method

TOKENS, MODEL_DIM, HIDDEN_DIM = 512, 64, 256  # of the timed layer
ROUNDS = 9


def production_router(method: Method) -> Optional[Tuple[str, Dict[str, Any]]]:
    """(router, options) that train a model by this method; None for methods included for comparison only."""
    if method.argmax_rule is False or method.name.startswith("reinforce"):
        return None
    return {
        "switch-argmax": ("switch", {}),
        "dense_st": ("dense_st", {"top_k": 1}),
        "default_moe": ("default_moe", {"top_k": 1}),
        "heun3": ("sparsemixer_v2", {"top_k": 1}),
    }.get(method.name, ("sparsemixer", {"gradient_estimator": method.name}))


def relative_times(methods: List[Method], num_experts: int, seed: int) -> Dict[str, float]:
    """Time per step relative to the switch router, by label: the minimum over several rounds through all layers."""
    found = ((method.label, production_router(method)) for method in methods)
    routers = {label: router for label, router in found if router is not None}
    routers["reference"] = ("switch", {})
    distinct = [router for index, router in enumerate(routers.values()) if router not in list(routers.values())[:index]]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [build_moe_layer(router, MODEL_DIM, HIDDEN_DIM, num_experts, **options) for router, options in distinct]
        x = torch.randn(TOKENS, MODEL_DIM, requires_grad=True)
        seconds = [min(times) for times in zip(*(_round(layers, x) for _ in range(ROUNDS)))]  # other load only adds time
    reference = seconds[distinct.index(routers.pop("reference"))]
    return {label: seconds[distinct.index(router)] / reference for label, router in routers.items()}


def _round(layers: List[MoELayer], x: Tensor) -> List[float]:
    seconds = []
    for layer in layers:
        start = time.perf_counter()
        layer(x).sum().backward()
        seconds.append(time.perf_counter() - start)
    return seconds
