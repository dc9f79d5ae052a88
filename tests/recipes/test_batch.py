"""The batch plan: same effective batch on any number of devices."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_sparsemixer.errors import ConfigurationError
from recipes.common.batch import plan_batch, plan_blocks


@pytest.mark.parametrize("world_size, update_freq", [(1, 16), (8, 2), (16, 1), (64, 1)])
def test_the_papers_batch_is_kept_on_any_number_of_devices(world_size, update_freq):
    plan = plan_batch(8192 * 16, 8192, world_size)
    assert (plan.tokens, plan.update_freq) == (8192 * 16, update_freq)


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(1, 512))
def test_no_device_exceeds_its_capacity_and_the_batch_does_not_exceed_its_target(target, device, world_size):
    if target < world_size:
        with pytest.raises(ConfigurationError):
            plan_batch(target, device, world_size)
        return
    plan = plan_batch(target, device, world_size)
    assert 1 <= plan.max_tokens <= device
    assert target - world_size * plan.update_freq < plan.tokens <= target


@given(st.integers(1, 1000), st.integers(1, 100), st.integers(1, 512), st.integers(1, 64))
def test_text_in_blocks_is_planned_in_whole_blocks(blocks, device_blocks, block, world_size):
    if blocks < world_size:
        return
    rest = block - 1  # less than a further block
    plan = plan_blocks(blocks * block + rest, device_blocks * block + rest, world_size, block)
    assert plan.max_tokens % block == 0 and block <= plan.max_tokens <= device_blocks * block
    assert blocks - world_size * plan.update_freq < plan.tokens // block <= blocks


def test_sizes_below_one_are_refused():
    with pytest.raises(ConfigurationError, match="--device-tokens 0"):
        plan_batch(100, 0, 1)
