"""Chunks: the order in which exchanges and products are issued, and the shares of the rows."""

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from fairseq_sparsemixer.moe.dispatch.all_to_all import order_to_send, split_counts
from fairseq_sparsemixer.moe.experts import Experts
from fairseq_sparsemixer.moe.layer import build_moe_layer, shard_experts
from fairseq_sparsemixer.moe.parallel import ExpertGroup, form_expert_group

CHUNKS, M = 3, 4


class Watched:
    """The work of an asynchronous collective, which records when it is waited for."""

    def __init__(self, work, number, events):
        self.work, self.number, self.events = work, number, events

    def wait(self):
        self.events.append(f"wait {self.number}")
        return self.work.wait()


class Mark(torch.autograd.Function):
    """The identity, which records in forward and in backward that an expert network starts."""

    @staticmethod
    def forward(ctx, rows, name, events):
        ctx.name, ctx.events = name, events
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad):
        ctx.events.append(ctx.name)
        return grad, None, None


def watch(events):
    """Record each all-to-all of rows by the order of starting, each wait for one, and each run of experts."""
    exchange, compute, products = dist.all_to_all_single, Experts.forward, iter(range(CHUNKS))

    def starting(output, rows, *sizes, **options):
        work = exchange(output, rows, *sizes, **options)
        if not options.get("async_op"):
            events.append("sizes")
            return work
        number = sum(event.startswith("send") for event in events)
        events.append(f"send {number}")
        return Watched(work, number, events)

    def computing(self, rows, counts):
        name = "shared" if self.num_experts == 1 else f"products {next(products)}"
        events.append(name)
        return Mark.apply(compute(self, rows, counts), name, events)

    dist.all_to_all_single, Experts.forward = starting, computing


def trace(experts_per_rank, capacity):
    """The events of a layer's forward and backward on this rank, whose second has no tokens."""
    model = torch.nn.Sequential(
        torch.nn.Linear(M, M),
        build_moe_layer(
            "switch", M, 8, 2 * experts_per_rank, num_shared_experts=1, **({"capacity_factor": 1.0} if capacity else {})
        ),
    )
    group = form_expert_group(2, chunks=CHUNKS)
    shard_experts(model, group)
    events = []
    watch(events)
    output = model(torch.randn(0 if group.index else 30, M))
    forwards = len(events)
    output.sum().backward()
    return events[:forwards], events[forwards:]


@pytest.mark.distributed
@pytest.mark.parametrize("capacity", [False, True], ids=["dropless", "capacity"])
@pytest.mark.parametrize("experts_per_rank", [1, 2])
def test_the_exchange_of_one_chunk_overlaps_the_products_of_another(experts_per_rank, capacity):
    """Sends are numbered in the order of starting, on one communicator: 0 to 2 out, 3 to 5 back, then the gradients'."""
    for forward, backward in run_ranks(2, trace, experts_per_rank, capacity):
        assert forward == [
            "sizes", "send 0", "send 1", "send 2", "shared",
            "wait 0", "products 0", "send 3", "wait 1", "products 1", "send 4", "wait 2", "products 2", "send 5",
            "wait 3", "wait 4", "wait 5",
        ]  # fmt: skip
        assert backward == [
            "send 6", "send 7", "send 8",
            "wait 6", "products 2", "send 9", "wait 7", "products 1", "send 10", "wait 8", "products 0", "send 11",
            "shared", "wait 11", "wait 10", "wait 9",
        ]  # fmt: skip


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_chunks_share_the_rows_of_each_expert_evenly(chunks):
    counts = torch.tensor([0, 1, 2, 5, 70])
    parts = split_counts(counts, chunks)
    assert parts.shape == (chunks, 5) and torch.equal(parts.sum(0), counts)
    assert (parts.max(0).values - parts.min(0).values).max() <= 1


@pytest.mark.parametrize("chunks", [2, 3, 7])
def test_the_order_to_send_is_a_stable_sort(chunks):
    counts = [0, 3, 8, 1, 0, 5]
    keys = []  # (chunk, expert) of each row, in the order by expert
    for expert, count in enumerate(counts):
        edges = [count * step // chunks for step in range(chunks + 1)]
        keys += [(chunk, expert) for chunk in range(chunks) for _ in range(edges[chunk], edges[chunk + 1])]
    expected = sorted(range(len(keys)), key=keys.__getitem__)
    group = ExpertGroup(1, 0, None, None, 1, True, chunks=chunks)
    assert order_to_send(torch.tensor(counts), group, len(keys)).tolist() == expected


def test_less_than_one_chunk_is_refused():
    with pytest.raises(ValueError, match="chunks=0 must be at least 1; 1 does not overlap"):
        form_expert_group(1, chunks=0)
