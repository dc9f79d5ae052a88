"""Routers: each file has a pure function from logits to a Routing, and a thin module that owns the projection."""

from fairseq_sparsemixer.moe.gates.fairscale import FairscaleGate
from fairseq_sparsemixer.moe.gates.gate import Gate
from fairseq_sparsemixer.moe.gates.registry import DENSE, GATES, build_gate, gate_class, gate_options, register_gate, routers_with
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.gates.step_state import reset_step_states, update_step_states

# importing these modules registers their routers
from fairseq_sparsemixer.moe.gates import base_layers, dense_st, expert_choice, gshard, hash, noisy_topk  # noqa: F401  isort:skip
from fairseq_sparsemixer.moe.gates import default_moe, expert_threshold, remoe, round_robin  # noqa: F401  isort:skip
from fairseq_sparsemixer.moe.gates import sinkhorn, sparsemixer, sparsemixer_v2, switch, topk  # noqa: F401  isort:skip

__all__ = [
    "DENSE",
    "FairscaleGate",
    "GATES",
    "Gate",
    "Routing",
    "build_gate",
    "reset_step_states",
    "gate_class",
    "gate_options",
    "register_gate",
    "routers_with",
    "update_step_states",
]
