"""Costs of whole layers on fake CUDA tensors, against counts by hand from the formulas of a feed-forward network."""

import pytest
import torch.nn.functional as F

from benchmarks.costs import Case
from benchmarks.devices import layer_times, read_devices
from benchmarks.layer_costs import count

S, M, H, E = 64, 16, 32, 8
HALF = 2  # bytes of a bfloat16
HOPPER, AMPERE = 9, 8

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")


def case(layer="sparsemixer", tokens=S, experts=E, top_k=1, group=1, capability=HOPPER):
    return Case(layer, tokens, experts, top_k, M, H, group, capability)


def product(rows, inner, columns, stacked=1):
    """Bytes of rows x inner by inner x columns, where one operand or the result is stacked for all experts."""
    return HALF * (rows * inner + rows * columns + stacked * inner * columns)


def test_the_dense_network_costs_its_six_products_and_four_passes():
    costs = count(case("dense"))
    forward = product(S, M, H) + HALF * H + HALF * 2 * S * H + product(S, H, M) + HALF * M  # with biases; relu
    backward = 2 * product(S, H, M) + HALF * 3 * S * H + 2 * product(S, M, H)
    bias_gradients = HALF * (S * M + M + S * H + H)
    assert costs.flops == 12 * S * M * H
    assert costs.bytes == forward + backward + bias_gradients
    assert (costs.launches, costs.waits, costs.sent, costs.saved) == (10, 0, [], HALF * S * H)


def test_the_dense_network_for_two_experts_per_token_is_twice_as_wide():
    assert count(case("dense", top_k=2)).flops == 2 * 12 * S * M * H


@needs_grouped_mm
@pytest.mark.parametrize("router, top_k", [("sparsemixer", 1), ("sparsemixer_v2", 2)])
def test_grouped_products_compute_the_routed_rows_and_read_all_weights(router, top_k):
    rows = top_k * S
    costs = count(case(router, top_k=top_k))
    grouped = [kernel for kernel, times in costs.kernels if kernel.name == "_grouped_mm" for _ in range(times)]
    networks = [kernel for kernel in grouped if kernel.flops == 2 * rows * M * H]
    ends = 4 * E  # of the groups, int32
    assert len(networks) == 6 and {kernel.bytes for kernel in networks} == {product(rows, M, H, stacked=E) + ends}
    ones = [kernel.flops for kernel in grouped if kernel not in networks]  # bias gradients: 8 columns of ones
    assert sorted(ones) == [2 * rows * 8 * M, 2 * rows * 8 * H]
    assert costs.waits == 0


@needs_grouped_mm
def test_ranks_that_share_experts_send_rows_four_times_and_wait_once():
    costs = count(case(group=4))
    assert costs.sent[1:] == [HALF * S * M] * 4  # the first: row counts
    assert costs.waits == 1


def test_a_gpu_without_grouped_products_launches_kernels_for_each_expert():
    few, many = (count(case(experts=experts, capability=AMPERE)) for experts in (4, 8))
    assert few.waits == many.waits == 1
    per_expert = (many.launches - few.launches) / 4
    assert per_expert >= 10  # those of a dense network


@pytest.mark.parametrize("group", [1, 4])
def test_costs_grow_with_tokens_on_every_device(group):
    grown = [count(case(tokens=tokens, group=group)) for tokens in (S, 2 * S, 4 * S)]
    for small, large in zip(grown, grown[1:]):
        assert small.bytes < large.bytes and small.flops < large.flops and small.launches == large.launches
        assert small.saved < large.saved and sum(small.sent) <= sum(large.sent)
        for device in read_devices().values():
            assert layer_times(small, device).total < layer_times(large, device).total


def test_tokens_that_cannot_be_divided_are_refused():
    with pytest.raises(ValueError, match="63 token-expert pairs, 8 experts and 1 ranks do not divide equally"):
        count(case(tokens=63))
