"""Routers: each file holds a pure function from logits to a Routing, and the thin module that owns its projection."""

from fairseq_sparsemixer.gates.gate import Gate
from fairseq_sparsemixer.gates.registry import DENSE, GATES, build_gate, gate_class, gate_options, register_gate
from fairseq_sparsemixer.gates.routing import Routing

# every module here registers its router
from fairseq_sparsemixer.gates import dense_st, sparsemixer, sparsemixer_v2, switch  # noqa: F401  isort:skip

__all__ = ["DENSE", "GATES", "Gate", "Routing", "build_gate", "gate_class", "gate_options", "register_gate"]
