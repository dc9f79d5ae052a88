"""W ranks compute the same as one process on the concatenated batch: losses, gradients, five Adam updates.

The single process uses no expert-parallel code. Both use the same noise, token by token.
"""

from itertools import product
from typing import Any, Dict, List, NamedTuple, Optional

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fairseq_sparsemixer.moe.gates.balance_scope import RanksScope
from fairseq_sparsemixer.moe.gates.sparsemixer import SamplingNoise
from fairseq_sparsemixer.moe.gradients import add_expert_norm, reduce_expert_gradients
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import form_expert_group

pytestmark = pytest.mark.distributed

M, H, S, UPDATES, BALANCE = 8, 12, 40, 5, 0.1
SIZES = {2: (13, 27), 4: (13, 1, 0, 26)}  # tokens per rank
ROUTERS = ("sparsemixer", "switch", "sparsemixer_v2")
LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]  # W, G


class Case(NamedTuple):
    world_size: int
    group_size: int
    num_experts: int
    router: str
    scope: str  # --balance-scope
    backend: str
    chunks: int = 1  # --moe-overlap
    ranks_per_node: Optional[int] = None  # --moe-hierarchical-exchange


CASES = [
    Case(world_size, group_size, num_experts, router, scope, backend)
    for (world_size, group_size), num_experts, router, (scope, backend) in product(
        LAYOUTS, (4, 8), ROUTERS, (("local", "legacy_ddp"), ("global", "pytorch_ddp"))
    )
]
CASES += [
    Case(world_size, group_size, 4, router, scope, backend, chunks)
    for (world_size, group_size), (router, chunks), (scope, backend) in product(
        ((2, 2), (4, 2), (4, 4)),
        (("sparsemixer", 2), ("sparsemixer_v2", 4)),
        (("local", "legacy_ddp"), ("global", "pytorch_ddp")),
    )
]
CASES += [
    Case(4, 4, num_experts, "sparsemixer_v2", scope, backend, chunks, 2)
    for num_experts, chunks, scope, backend in ((4, 2, "global", "pytorch_ddp"), (8, 1, "local", "legacy_ddp"))
]


class Model(nn.Module):
    """An MoE layer between two projections, so that gradients pass through it."""

    def __init__(self, router: str, num_experts: int):
        super().__init__()
        torch.manual_seed(3)
        self.enter, self.leave = nn.Linear(M, M), nn.Linear(M, M)
        self.moe = build_moe_layer(router, M, H, num_experts)

    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return self.leave(self.moe(self.enter(x).tanh(), padding_mask))


class Batch(NamedTuple):
    """Tokens x, targets y, padding mask, and the routing noise of each token."""

    x: Tensor
    y: Tensor
    padding: Tensor
    gumbel: Tensor
    coin: Tensor

    def part(self, start: int, stop: int) -> "Batch":
        return Batch(*(tensor[start:stop] for tensor in self))


def batch(update: int, num_experts: int) -> Batch:
    generator = torch.Generator().manual_seed(100 + update)
    draw = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    x, y = 4 * draw(S, M) - 2, 4 * draw(S, M) - 2
    return Batch(x, y, draw(S) < 0.2, -(-draw(S, 2, num_experts).log()).log(), draw(S, 2))


def noise(router: str, batch: Batch) -> Any:
    """The batch's noise in the router's form: it belongs to the token, on whichever rank it is."""
    draws = [SamplingNoise(batch.gumbel[:, draw], batch.coin[:, draw]) for draw in range(2)]
    return {"sparsemixer": draws[0], "sparsemixer_v2": draws, "switch": 0.9 + 0.2 * batch.coin[:, :1]}[router]


def loss_of(model: nn.Module, moe: nn.Module, router: str, batch: Batch) -> Tensor:
    """The loss summed over non-padding tokens, plus sample_size times the weighted balance loss, as in fairseq's criterions."""
    moe.gate.draw_noise = lambda logits: noise(router, batch)
    error = (model(batch.x, batch.padding) - batch.y).square().sum(-1)
    sample_size = (~batch.padding).sum()
    return error.masked_fill(batch.padding, 0).sum() + sample_size * BALANCE * moe.routing.aux_losses["balance"]


def snapshot(model: nn.Module, losses: List[float], gradients: List[Dict[str, Tensor]]) -> Dict[str, Any]:
    return {
        "losses": losses,
        "gradients": gradients,
        "parameters": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
    }


def train_alone(case: Case) -> Dict[str, Any]:
    """The reference: one process with the whole batch or, for the local balance loss, accumulating over the ranks' parts."""
    model = Model(case.router, case.num_experts)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, gradients = [], []
    for update in range(UPDATES):
        whole = batch(update, case.num_experts)
        parts, start = [whole], 0
        if case.scope == "local":
            parts = []
            for size in SIZES[case.world_size]:
                parts.append(whole.part(start, start + size))
                start += size
        optimizer.zero_grad()
        total = 0.0
        for part in parts:
            loss = loss_of(model, model.moe, case.router, part)
            loss.backward()
            total += loss.item()
        for parameter in model.parameters():
            parameter.grad /= (~whole.padding).sum()
        losses.append(total)
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
    return snapshot(model, losses, gradients)


def train_on_rank(case: Case) -> Dict[str, Any]:
    """Train one rank like MoETrainer, without fairseq."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model = Model(case.router, case.num_experts)
    ranks = None
    if case.group_size > 1:
        ranks = form_expert_group(case.group_size, chunks=case.chunks, ranks_per_node=case.ranks_per_node)
        shard_experts(model, ranks)
    if case.scope == "global":
        model.moe.gate.balance_scope = RanksScope(dist.new_group())
    wrapped = DistributedDataParallel(model) if case.backend == "pytorch_ddp" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, gradients = [], []
    start = sum(SIZES[world_size][:rank])
    for update in range(UPDATES):
        whole = batch(update, case.num_experts)
        optimizer.zero_grad()
        loss = loss_of(wrapped, model.moe, case.router, whole.part(start, start + SIZES[world_size][rank]))
        loss.backward()
        if case.backend == "legacy_ddp":
            for parameter in model.parameters():
                if not hasattr(parameter, "expert"):
                    parameter.grad /= world_size
                    dist.all_reduce(parameter.grad)
        if ranks is not None:
            reduce_expert_gradients(model, ranks)
        for parameter in model.parameters():
            parameter.grad *= world_size / (~whole.padding).sum()
        losses.append(loss.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
    result = snapshot(model, losses, gradients)
    if ranks is not None:
        shared = [parameter.grad for parameter in model.parameters() if not hasattr(parameter, "expert")]
        norm = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in shared]))
        result["norm"] = add_expert_norm(norm, list(model.parameters()), ranks.group).item()
    return result


def train_on_rank_all(world_size: int) -> List[Dict[str, Any]]:
    return [train_on_rank(case) for case in CASES if case.world_size == world_size]


@pytest.fixture(scope="module")
def outcomes() -> Dict[Case, List[Dict[str, Any]]]:
    """The results of all ranks for each case."""
    found = {}
    for world_size in SIZES:
        by_rank = run_ranks(world_size, train_on_rank_all, world_size)
        cases = [case for case in CASES if case.world_size == world_size]
        found.update({case: [results[index] for results in by_rank] for index, case in enumerate(cases)})
    return found


def whole(tensors: List[Tensor], name: str, case: Case) -> Tensor:
    """The tensor of all experts, concatenated over the ranks of the first group."""
    return torch.cat(tensors[: case.group_size]) if ".experts." in name else tensors[0]


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Compare within 1e-5 of the largest entry."""
    difference = (actual - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max() + 1e-8, f"{name}: {difference} of {expected.abs().max()}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_equal_one_process(case, outcomes):
    expected = train_alone(case)
    found = outcomes[case]
    for update in range(UPDATES):
        total = sum(result["losses"][update] for result in found)
        assert total == pytest.approx(expected["losses"][update], rel=1e-5)
        for name, gradient in expected["gradients"][update].items():
            actual = whole([result["gradients"][update][name] for result in found], name, case)
            assert_close(actual, gradient, f"gradient of {name} at update {update}")
    for name, parameter in expected["parameters"].items():
        actual = whole([result["parameters"][name] for result in found], name, case)
        assert_close(actual, parameter, name)
        for rank, result in enumerate(found):  # replicas of experts, and parameters held by every rank, are bitwise identical
            first = rank % case.group_size if ".experts." in name else 0
            assert torch.equal(result["parameters"][name], found[first]["parameters"][name])
    if case.group_size > 1:
        norm = torch.cat([gradient.flatten() for gradient in expected["gradients"][-1].values()]).norm().item()
        assert {result["norm"] for result in found} == {found[0]["norm"]}
        assert found[0]["norm"] == pytest.approx(norm, rel=1e-5)
