"""Sorting, gathering and combining by the fused kernels of kernels/; counts stay on the device."""

import torch
from torch import Tensor

from fairseq_sparsemixer.moe.dispatch.combine import with_defaults
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates.routing import Routing
from fairseq_sparsemixer.moe.kernels import functions


class FusedPairs:
    """As pairs.Pairs, by the kernels."""

    def __init__(self, routing: Routing):
        self.routing = routing
        self.order = functions.sort(routing.expert_index, routing.unrouted(), routing.num_experts)

    @property
    def counts(self) -> Tensor:
        """The routed pairs of each expert [E] int64, on the device."""
        return self.order.ends.diff(prepend=self.order.ends.new_zeros(1)).long()

    def reorder(self, order: Tensor) -> None:
        """See pairs.Pairs. `order.ends` keeps only its last entry's meaning, the number of routed pairs: see gather, combine."""
        pairs, place, ends = self.order
        pairs = torch.cat([pairs.index_select(0, order), pairs[len(order) :]])
        rows = torch.arange(len(pairs), dtype=place.dtype, device=place.device)
        self.order = functions.Order(pairs, torch.empty_like(place).scatter_(0, pairs, rows), ends)

    def gather(self, tokens: Tensor, rows: int) -> Tensor:
        """tokens [S, M] -> [N, M], the tokens of the first `rows` pairs."""
        return functions.gather(tokens, self.order, rows, self.routing.expert_index.size(1), tokens.dtype)

    def combine(self, rows: Tensor) -> Tensor:
        """rows [N, M], the experts' outputs -> [S, M]; see combine.combine."""
        routing = self.routing
        output = functions.combine(rows, routing.combine_weight, None, routing.output_scale, routing.expert_index, self.order)
        return output if routing.default is None else with_defaults(output, rows, routing, self.order.pairs[: rows.size(0)])


def dispatch_fused(tokens: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """As dispatch_locally with counts_on_device: tokens [S, M] -> [S, M], in the precision of the experts.

    The cast belongs to the gather, and the output bias to the combine.
    """
    pairs, weights = FusedPairs(routing), experts.weights(tokens)
    order, dtype = pairs.order, weights.weight_in.dtype
    count = routing.expert_index.numel() if routing.max_routed is None else routing.max_routed
    if routing.skipped is not None and routing.max_routed is None:
        count = int(order.ends[-1])  # a synchronisation costs less than the E rows per token that might run
    rows = functions.gather(tokens, order, count, routing.expert_index.size(1), dtype)
    if routing.default is not None:  # the outputs are also averaged
        return pairs.combine(experts(rows, pairs.counts))
    assert experts.activation_name is not None  # is_fused
    inputs = rows, *weights[:3], None, order.ends, experts.activation_name, experts.current_dropout
    outputs = experts.run(functions.feed_forward, *inputs)
    scale, index = routing.output_scale, routing.expert_index
    return functions.combine(outputs, routing.combine_weight, weights.bias_out, scale, index, order)
