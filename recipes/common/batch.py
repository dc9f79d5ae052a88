"""The same effective batch on 1, 8 or 64 GPUs: derives gradient accumulation from a target in tokens."""

import math
from typing import NamedTuple

from fairseq_sparsemixer.errors import ConfigurationError


class BatchPlan(NamedTuple):
    """fairseq's --max-tokens (per device and micro-batch) and --update-freq (micro-batches per update) on world_size devices."""

    max_tokens: int
    update_freq: int
    world_size: int

    @property
    def tokens(self) -> int:
        """Tokens per update, padding included: the effective batch."""
        return self.max_tokens * self.update_freq * self.world_size


def plan_batch(target_tokens: int, device_tokens: int, world_size: int) -> BatchPlan:
    """Split target_tokens per update (rounded down) into the fewest micro-batches of at most device_tokens per device.

    Raises ConfigurationError if a device would get less than one token.
    """
    for flag, value in (("--batch-tokens", target_tokens), ("--device-tokens", device_tokens), ("--world-size", world_size)):
        if value < 1:
            raise ConfigurationError(f"{flag} {value} must be at least 1")
    if target_tokens < world_size:
        raise ConfigurationError(
            f"--batch-tokens {target_tokens} is less than one token per device on {world_size} devices;"
            " use fewer devices or a larger batch"
        )
    update_freq = min(math.ceil(target_tokens / (device_tokens * world_size)), target_tokens // world_size)
    return BatchPlan(target_tokens // (world_size * update_freq), update_freq, world_size)


def plan_blocks(target_tokens: int, device_tokens: int, world_size: int, block: int) -> BatchPlan:
    """plan_batch for text in blocks of `block` tokens, where a device takes whole blocks; at least one must fit."""
    plan = plan_batch(target_tokens // block, device_tokens // block, world_size)
    return plan._replace(max_tokens=plan.max_tokens * block)
