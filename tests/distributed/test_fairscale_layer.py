"""Our layer agrees with fairscale's own MOELayer.forward in the same process group."""

import pytest
import torch
from fairscale.nn.moe import MOELayer as FairscaleLayer
from ranks import run_ranks
from torch import Tensor, nn
from torch import distributed as dist

from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group

pytestmark = pytest.mark.distributed

M, H, S, E = 8, 12, 16, 8


class DenseGate(nn.Module):
    """One of our gates with fairscale's interface and capacity for every token: combine weights [S, E, C], C = 2 S."""

    def __init__(self, gate: nn.Module):
        super().__init__()
        self.gate = gate

    def forward(self, tokens: Tensor):
        routing: Routing = self.gate(tokens)
        combine = tokens.new_zeros(len(tokens), E, 2 * len(tokens))
        for choice in range(routing.expert_index.size(1)):
            place = torch.arange(len(tokens)) + choice * len(tokens)  # a separate slot for every pair
            weight = routing.combine_weight[:, choice]
            combine = combine.index_put((torch.arange(len(tokens)), routing.expert_index[:, choice], place), weight)
        return routing.aux_losses["balance"], combine, combine.detach() != 0


class OneExpert(nn.Module):
    """Expert e of our stacked experts as a separate module, as required by fairscale."""

    def __init__(self, experts: nn.Module, index: int):
        super().__init__()
        self.into, self.out = nn.Linear(M, H), nn.Linear(H, M)
        with torch.no_grad():
            self.into.weight.copy_(experts.weight_in[index].t()), self.into.bias.copy_(experts.bias_in[index])
            self.out.weight.copy_(experts.weight_out[index].t()), self.out.bias.copy_(experts.bias_out[index])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.into(x).relu())


def compare(router: str):
    """(output, input gradient, gradients of projection and weight_in) of our layer, then of fairscale's."""
    local = E // dist.get_world_size()
    results = []
    for ours in (True, False):
        torch.manual_seed(2)
        layer = build_moe_layer(router, M, H, E)
        ranks = form_expert_group(dist.get_world_size())
        torch.manual_seed(20 + dist.get_rank())
        x = torch.randn(4, S // 4, M, requires_grad=True)  # fairscale requires a first dimension divisible by its local experts
        if ours:
            shard_experts(layer, ranks)
            run = layer
        else:
            first = dist.get_rank() * local
            experts = nn.ModuleList(OneExpert(layer.experts, first + index) for index in range(local))
            run = FairscaleLayer(DenseGate(layer.gate), experts, group=ranks.group)
        torch.manual_seed(30)  # the same noise for both
        output = run(x)
        if not ours and hasattr(layer.gate, "omega"):
            output = output * layer.gate.omega
        (output.square().sum() + run.l_aux).backward()
        weight_in = layer.experts.weight_in.grad if ours else torch.stack([e.into.weight.grad.t() for e in run.experts])
        results.append((output.detach(), x.grad, layer.gate.projection.weight.grad, weight_in))
    return results


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("router", ["sparsemixer", "switch", "sparsemixer_v2"])
def test_our_layer_agrees_with_fairscales(router, world_size):
    for ours, theirs in run_ranks(world_size, compare, router):
        for actual, expected in zip(ours, theirs):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
