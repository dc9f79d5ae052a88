"""Capacity with experts on two ranks: each rank's tokens are kept, dropped and computed as in one process."""

from typing import Any, Dict, List, NamedTuple

import pytest
import torch
from ranks import run_ranks
from torch import Tensor

from fairseq_sparsemixer import build_moe_layer
from fairseq_sparsemixer.moe.layer import MoELayer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group

pytestmark = pytest.mark.distributed

M, H, E = 6, 10, 4
TOKENS = (23, 11)  # per rank


class Case(NamedTuple):
    """options: of the gate. training: its mode."""

    name: str
    router: str
    options: Dict[str, Any]
    training: bool = True


CASES = [
    Case("batch priority", "topk", {"capacity_factor": 0.75, "capacity_policy": "batch"}),
    Case("largest weights", "topk", {"capacity_factor": 0.75, "capacity_policy": "probability"}),
    Case("random second expert", "gshard", {"capacity_factor": 0.75, "second_expert_policy": "random"}),
    Case("evaluation", "gshard", {"eval_capacity_factor": 0.75, "capacity_policy": "batch"}, training=False),
]


def compute(case: Case, layer: MoELayer, rank: int) -> List[Tensor]:
    """Output, dropped choices, and the gradients of tokens and experts."""
    torch.manual_seed(20 + rank)
    tokens = torch.randn(TOKENS[rank], M)
    tokens[:, 0] += 1.0  # uneven loads
    tokens.requires_grad_()
    padding = torch.rand(TOKENS[rank]) < 0.2
    output = layer.train(case.training)(tokens, padding)
    output.square().sum().backward()
    return [output.detach(), layer.routing.dropped, tokens.grad, *(p.grad for p in layer.experts.parameters())]


def build(case: Case) -> MoELayer:
    torch.manual_seed(4)
    return build_moe_layer(case.router, M, H, E, **case.options)


def on_rank(cases: List[Case]) -> Dict[str, List[Tensor]]:
    ranks, results = form_expert_group(2), {}
    for case in cases:
        layer = build(case)
        shard_experts(layer, ranks)
        results[case.name] = compute(case, layer, ranks.index)
    return results


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(2, on_rank, CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_two_ranks_compute_and_drop_what_one_process_does(case, outcomes):
    alone = [compute(case, build(case), rank) for rank in (0, 1)]
    for rank, expected in enumerate(alone):
        output, dropped, grad = outcomes[rank][case.name][:3]
        assert dropped.any() and torch.equal(dropped, expected[1])
        torch.testing.assert_close(output, expected[0])
        torch.testing.assert_close(grad, expected[2])
    for index, gradients in enumerate(zip(*(result[3:] for result in alone)), 3):
        together = torch.cat([outcomes[rank][case.name][index] for rank in (0, 1)])
        torch.testing.assert_close(together, sum(gradients))
