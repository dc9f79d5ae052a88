"""An adapter with the interface of fairscale's Top2Gate, so that fairscale's own MOELayer can run any gate."""

from typing import Optional, Tuple

from torch import Tensor, nn

from fairseq_sparsemixer.moe.gates.gate import Gate
from fairseq_sparsemixer.moe.gates.routing import Routing


class FairscaleGate(nn.Module):
    """gate(tokens [S, M]) -> (l_aux, combine_weights [S, E, C], dispatch_mask [S, E, C]), see Routing.to_fairscale."""

    def __init__(self, gate: Gate, capacity: Optional[int] = None):
        super().__init__()
        self.gate = gate
        self.capacity = capacity

    def forward(self, tokens: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """See the class. The caller must apply SparseMixer's omega and add Default MoE's default outputs."""
        routing: Routing = self.gate(tokens)
        return routing.to_fairscale(self.capacity)
