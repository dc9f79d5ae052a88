"""Outputs and gradients of our layer equal those of fairscale's MOELayer with the same gate, for every gate."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.gates import GATES, FairscaleGate, gate_options
from fairseq_sparsemixer.moe.layer import MOELayer as FairscaleMOELayer


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    """A gloo group with only this process."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class OneExpert(nn.Module):
    """Expert e of our stacked experts as a separate module, as required by fairscale."""

    def __init__(self, experts, index):
        super().__init__()
        self.experts, self.index = experts, index

    def forward(self, x):
        e, experts = self.index, self.experts
        hidden = torch.relu(x @ experts.weight_in[e] + experts.bias_in[e])
        return hidden @ experts.weight_out[e] + experts.bias_out[e]


@pytest.mark.parametrize("capacity_factor", [None, 0.75])
@pytest.mark.parametrize("router", sorted(GATES))
def test_fairscales_layer_with_our_gate_equals_our_layer(process_group, router, capacity_factor):
    options = {}
    if capacity_factor is not None:
        if "capacity_factor" not in gate_options(router):
            pytest.skip(f"{router} takes no capacity factor")
        options["capacity_factor"] = capacity_factor
    ours = build_moe_layer(router, 8, 16, 4, **options)
    theirs = copy.deepcopy(ours)
    reference = FairscaleMOELayer(
        FairscaleGate(theirs.gate), nn.ModuleList([OneExpert(theirs.experts, e) for e in range(4)]), process_group
    )
    x = torch.randn(4, 6, 8)
    upstream = torch.randn(4, 6, 8)
    inputs, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    for layer, run, leaf in ((ours, ours, inputs[0]), (theirs, reference, inputs[1])):
        torch.manual_seed(7)  # the same noise for both
        output = run(leaf)
        if run is reference and hasattr(theirs.gate, "omega"):
            output = output * theirs.gate.omega
        balance = ours.routing.aux_losses.get("balance", torch.zeros(())) / 16 if run is ours else reference.l_aux
        outputs.append(output)
        ((output * upstream).sum() + 5 * balance).backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-5)
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            assert others[name].grad is None
        else:
            torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_smaller_capacity_drops_the_last_tokens():
    layer = build_moe_layer("switch", 8, 16, 2, jitter_eps=0)
    routing = layer.gate.route(torch.tensor([[1.0, 0]] * 5 + [[0, 1.0]]))
    _, combine, mask = routing.to_fairscale(capacity=3)
    assert combine.shape == mask.shape == (6, 2, 3)
    assert mask.nonzero().tolist() == [[0, 0, 0], [1, 0, 1], [2, 0, 2], [5, 1, 0]]
    assert torch.equal(combine > 0, mask)


def test_padding_and_empty_batches_convert_to_fairscales_triple():
    gate = build_moe_layer("switch", 8, 16, 2).gate
    _, combine, mask = gate.route(torch.randn(3, 2), torch.tensor([True, True, True])).to_fairscale()
    assert combine.shape == (3, 2, 1) and not mask.any()
    l_aux, combine, _ = gate.route(torch.zeros(0, 2)).to_fairscale()
    assert l_aux == 0 and combine.shape == (0, 2, 1)
