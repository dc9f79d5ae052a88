"""The exchange in two steps, inside nodes and between them: as in one step, bit for bit, with fewer messages between nodes."""

from dataclasses import replace
from typing import Any, Dict, List

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch import dispatch_all_to_all
from fairseq_sparsemixer.moe.dispatch.all_to_all import plan_exchange
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.kernels import choice
from fairseq_sparsemixer.moe.parallel import form_expert_group, spans_nodes

M, H = 4, 8
TOKENS = {
    "uneven": (9, 0, 30, 1, 17, 4),
    "none on a node": (5, 8, 0, 0, 0, 0),
    "none": (0,) * 6,
    "to one expert": (6, 0, 7, 3, 2, 5),
}
LAYOUTS = [(4, 2), (6, 2), (6, 3)]  # G, ranks per node
PATHS = ("host", "grouped", "fused") if hasattr(F, "grouped_mm") else ("host", "fused")


def decide(case: str, rank: int, num_experts: int) -> Any:
    torch.manual_seed(10 + rank)
    shape = TOKENS[case][rank], 2
    index = torch.full(shape, num_experts - 1) if case == "to one expert" else torch.randint(num_experts, shape)
    weight = torch.rand(shape).requires_grad_()
    padding = torch.rand(shape[0]) < 0.2
    routing = Routing(index, weight, probabilities=torch.ones(shape[0], num_experts), padding_mask=padding)
    return torch.randn(shape[0], M).requires_grad_(), routing, torch.randn(shape[0], M)


def compute(case: str, group: Any, local: int, path: str) -> List[Tensor]:
    """The layer's output, and the gradients of tokens, weights and this rank's experts."""
    tokens, routing, direction = decide(case, group.index, local * group.size)
    torch.manual_seed(5)
    experts = Experts(local * group.size, M, H)
    experts.shard(group.index * local, local)
    with choice.forced(path == "fused"):
        output = dispatch_all_to_all(tokens, routing, experts, group, path != "host", path == "fused")
        (output * direction).sum().backward()
    return [output.detach(), tokens.grad, routing.combine_weight.grad, *(parameter.grad for parameter in experts.parameters())]


def in_one_and_two_steps(ranks_per_node: int) -> Dict[Any, Any]:
    """Both results of each case on this rank."""
    nested = form_expert_group(dist.get_world_size(), ranks_per_node=ranks_per_node)
    flat = replace(nested, nodes=None)
    return {
        (case, local, chunks, path): [compute(case, replace(group, chunks=chunks), local, path) for group in (flat, nested)]
        for case in TOKENS
        for local, chunks in ((1, 1), (3, 1), (2, 3))
        for path in PATHS
    }


@pytest.mark.distributed
@pytest.mark.parametrize("size, ranks_per_node", LAYOUTS)
def test_results_and_gradients_are_those_of_one_step_bit_for_bit(size, ranks_per_node):
    for by_case in run_ranks(size, in_one_and_two_steps, ranks_per_node):
        for case, (flat, nested) in by_case.items():
            for expected, found in zip(flat, nested):
                assert torch.equal(expected, found), case


def messages(ranks_per_node: int) -> Any:
    """Of a rank that sends ten rows to each of the ranks' two experts: the sizes of each step, and what passes through."""
    group = form_expert_group(dist.get_world_size(), ranks_per_node=ranks_per_node)
    (plan,) = plan_exchange(torch.full((2 * group.size,), 10), group)
    route = plan.route
    return route.inside[:2], route.between[:2], route.passing, dist.get_process_group_ranks(route.between.group)


@pytest.mark.distributed
def test_a_rank_sends_one_message_to_each_other_node():
    found = run_ranks(6, messages, 2)
    inside, between = [60, 60], [40, 40, 40]  # three nodes of two ranks
    assert found == [
        ((inside, inside), (between, between), [[20] * 3] * 2, [rank % 2 + step for step in (0, 2, 4)]) for rank in range(6)
    ]


@pytest.mark.parametrize(
    "size, ranks_per_node, expected", [(8, None, False), (8, 1, False), (8, 8, False), (4, 8, False), (8, 2, True)]
)
def test_two_steps_need_several_nodes_with_several_ranks(size, ranks_per_node, expected):
    assert spans_nodes(size, ranks_per_node) == expected


@pytest.mark.parametrize(
    "size, ranks_per_node, remedy", [(8, 3, "one of 2, 4, or"), (4, 6, "one of 2, or"), (3, 2, "leave it"), (4, 0, "one of 2")]
)
def test_nodes_that_do_not_divide_a_group_are_refused(size, ranks_per_node, remedy):
    with pytest.raises(ValueError, match=f"ranks_per_node={ranks_per_node} does not divide the {size} ranks .*{remedy}"):
        spans_nodes(size, ranks_per_node)
