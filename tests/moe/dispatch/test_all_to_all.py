"""Both dispatchers for experts on other ranks, compared with local experts."""

from dataclasses import replace
from functools import partial
from typing import List, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch import dispatch_all_to_all, dispatch_equal_split, dispatch_locally
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.gates import Routing
from fairseq_sparsemixer.moe.kernels import choice
from fairseq_sparsemixer.moe.parallel import CollectiveTimer, form_expert_group

pytestmark = pytest.mark.distributed

M, H = 8, 16


def fused(send):
    """The dispatcher as on a GPU with the fused kernels, whose formulas run on a CPU."""

    def run(*arguments):
        with choice.forced(True):
            return send(*arguments, counts_on_device=True, fused=True)

    return run


def chunked(tokens, routing, experts, ranks, *arguments, **options):
    """The dispatcher with three chunks: more than some experts get rows, and fewer than others."""
    return dispatch_all_to_all(tokens, routing, experts, replace(ranks, chunks=3), *arguments, **options)


DISPATCHERS = {"variable": dispatch_all_to_all, "equal": dispatch_equal_split, "chunks": chunked}
DISPATCHERS.update({f"{name}, fused": fused(send) for name, send in list(DISPATCHERS.items())})
if hasattr(F, "grouped_mm"):  # as on a GPU, with counts on the device
    DISPATCHERS.update({f"{name}, grouped": partial(send, counts_on_device=True) for name, send in list(DISPATCHERS.items())[:3]})


class Case(NamedTuple):
    """tokens: number per rank. only_expert: the expert of all tokens; None: random experts."""

    name: str
    tokens: List[int]
    num_experts: int = 4
    k: int = 1
    only_expert: int = None
    dropped: float = 0.0
    padding: float = 0.0


CASES = [
    Case("no tokens on one rank", [0, 7], k=2),
    Case("no tokens anywhere", [0, 0]),
    Case("1 and 1000 tokens", [1, 1000]),
    Case("all tokens to one expert", [20, 30], only_expert=3),
    Case("all tokens to one expert, twice", [20, 30], k=2, only_expert=0),
    Case("all padding on one rank", [5, 9], padding=1.0),
    Case("some padding, some dropped", [40, 25], k=2, num_experts=8, dropped=0.3, padding=0.2),
    Case("everything dropped", [3, 4], dropped=1.0),
    Case("one expert per rank", [7, 5], num_experts=2, k=2),
    *[
        Case(f"random {n}", torch.randint(0, 12, (2,), generator=torch.Generator().manual_seed(n)).tolist(), 2 + 2 * (n % 4),
             k=1 + n % 2, dropped=0.1 * (n % 3), padding=0.2 * (n % 2))
        for n in range(20)
    ],
]  # fmt: skip


def make(case: Case, rank: int):
    """Tokens and a routing for one rank, both requiring gradients."""
    torch.manual_seed(10 + rank)
    count = case.tokens[rank]
    shape = count, case.k
    tokens = torch.randn(count, M).requires_grad_()
    index = torch.randint(case.num_experts, shape) if case.only_expert is None else torch.full(shape, case.only_expert)
    weight = torch.rand(shape).requires_grad_()
    padding = torch.rand(count) < case.padding if not (case.padding == 1.0 and rank) else torch.zeros(count, dtype=torch.bool)
    routing = Routing(
        expert_index=index,
        combine_weight=weight,
        probabilities=torch.full((count, case.num_experts), 1 / case.num_experts),
        padding_mask=padding,
        dropped=(torch.rand(shape) < case.dropped) if case.dropped else None,
    )
    return tokens, routing, torch.randn(count, M)


def experts_of(case: Case) -> Experts:
    torch.manual_seed(5)
    return Experts(case.num_experts, M, H)


def compute(dispatch, case: Case, experts: Experts, rank: int) -> List[Tensor]:
    """Output, and the gradients of tokens, combine weights and expert parameters."""
    tokens, routing, direction = make(case, rank)
    output = dispatch(tokens, routing, experts)
    (output * direction).sum().backward()
    weight_grad = torch.zeros_like(routing.combine_weight) if routing.combine_weight.grad is None else routing.combine_weight.grad
    return [output.detach(), tokens.grad, weight_grad, *(parameter.grad for parameter in experts.parameters())]


def on_rank(cases: List[Case]):
    ranks = form_expert_group(2, timer=CollectiveTimer())
    results = {}
    for case in cases:
        for name, dispatch in DISPATCHERS.items():
            experts, local = experts_of(case), case.num_experts // 2
            experts.shard(ranks.index * local, local)
            together = lambda tokens, routing, experts: dispatch(tokens, routing, experts, ranks)  # noqa: B023, E731
            results[case.name, name] = compute(together, case, experts, ranks.index)
    assert ranks.timer.read().cpu > 0
    return results


@pytest.fixture(scope="module")
def outcomes():
    return run_ranks(2, on_rank, CASES)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_outputs_and_gradients_equal_those_of_local_experts(case, dispatcher, outcomes):
    expert_grads = []
    for rank in (0, 1):
        expected = compute(dispatch_locally, case, experts_of(case), rank)
        for actual, wanted in zip(outcomes[rank][case.name, dispatcher][:3], expected[:3]):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
        expert_grads.append(expected[3:])
    for index, (first, second) in enumerate(zip(*expert_grads)):
        actual = torch.cat([outcomes[rank][case.name, dispatcher][3 + index] for rank in (0, 1)])
        torch.testing.assert_close(actual, first + second, rtol=1e-5, atol=1e-5)


def count_rows(case: Case):
    """The rows that this rank passes to all_to_all_single, and its number of real tokens."""
    ranks, sent = form_expert_group(2), []
    original = dist.all_to_all_single

    def counting(output, rows, *args, **kwargs):
        if rows.is_floating_point():
            sent.append(len(rows))
        return original(output, rows, *args, **kwargs)

    dist.all_to_all_single = counting
    experts = experts_of(case)
    experts.shard(ranks.index * 2, 2)
    tokens, routing, _ = make(case, ranks.index)
    dispatch_all_to_all(tokens, routing, experts, ranks)
    return sent[0], int((~routing.padding_mask).sum())


def test_padding_is_not_sent():
    for sent, real in run_ranks(2, count_rows, Case("padding", [30, 10], padding=0.5)):
        assert sent == real < 30


def kinds_of_counts():
    """By dispatcher: whether the experts got their counts as a tensor."""
    group, kinds = form_expert_group(2), {}
    tokens, routing, _ = make(Case("some padding", [6, 3], padding=0.3), group.index)
    for name, dispatch in DISPATCHERS.items():

        def experts(rows, counts):
            kinds[name] = torch.is_tensor(counts)  # noqa: B023
            return rows

        dispatch(tokens, routing, experts, group)
    return kinds


def test_counts_come_to_the_host_unless_asked_to_stay_on_the_device():
    for kinds in run_ranks(2, kinds_of_counts):
        assert kinds == {name: name.endswith(("grouped", "fused")) for name in DISPATCHERS}
