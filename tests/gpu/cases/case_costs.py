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
    assert len(grouped) == len(networks) and costs.waits == 0


@needs_grouped_mm
def test_ranks_that_share_experts_send_rows_four_times_and_wait_once():
    costs = count(case(group=4))
    assert costs.sent[1:] == [HALF * S * M] * 4  # the first: row counts
    assert costs.waits == 1


def test_a_gpu_without_torchs_grouped_product_has_that_of_triton_with_the_same_costs():
    few, many, hopper = count(case(experts=4, capability=AMPERE)), count(case(capability=AMPERE)), count(case())
    assert few.launches == many.launches == hopper.launches and few.waits == many.waits == 0
    assert many.flops == hopper.flops and many.bytes == hopper.bytes
    assert sum(times for kernel, times in many.kernels if kernel.name.startswith("grouped_")) == 6


def test_fused_passes_read_and_write_each_row_once():
    by_name = {kernel.name: kernel.bytes for kernel, _ in count(case()).kernels}
    assert 0 <= by_name["bias_activation"] - HALF * 2 * S * H <= HALF * E * H + 4 * E  # the bias and the ends
    tiles = 1 + E + 1
    read_and_written = HALF * 3 * S * H + HALF * E * H + 4 * E + 4 * tiles * H  # sums of tiles in float32
    assert by_name["bias_activation_backward"] == read_and_written
    assert by_name["gather_rows"] == HALF * 2 * S * M + 8 * S + 4 * E  # with the pairs


def test_the_router_costs_three_products_of_float32_in_three_parts_of_tf32():
    products = [kernel for kernel, _ in count(case()).kernels if kernel.name.startswith("project")]
    assert [kernel.flops for kernel in products] == [6 * 2 * S * E * M] * 3 and not any(kernel.float32 for kernel in products)


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
