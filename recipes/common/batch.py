"""The same effective batch on 1, 8 or 64 GPUs: gradient accumulation worked out from a target in tokens."""

import math
from typing import NamedTuple

from fairseq_sparsemixer.errors import ConfigurationError


class BatchPlan(NamedTuple):
    """fairseq's --max-tokens (a device and micro-batch) and --update-freq (micro-batches an update) on world_size devices."""

    max_tokens: int
    update_freq: int
    world_size: int

    @property
    def tokens(self) -> int:
        """Tokens an update, padding included: the effective batch."""
        return self.max_tokens * self.update_freq * self.world_size


def plan_batch(target_tokens: int, device_tokens: int, world_size: int) -> BatchPlan:
    """As few micro-batches as fit `device_tokens` on a device, so that an update has target_tokens, rounded down.

    Raises ConfigurationError where every device would get less than one token.
    """
    for flag, value in (("--batch-tokens", target_tokens), ("--device-tokens", device_tokens), ("--world-size", world_size)):
        if value < 1:
            raise ConfigurationError(f"{flag} {value} must be at least 1")
    if target_tokens < world_size:
        raise ConfigurationError(
            f"--batch-tokens {target_tokens} leaves nothing for some of {world_size} devices; use fewer, or a larger batch"
        )
    update_freq = min(math.ceil(target_tokens / (device_tokens * world_size)), target_tokens // world_size)
    return BatchPlan(target_tokens // (world_size * update_freq), update_freq, world_size)


def plan_blocks(target_tokens: int, device_tokens: int, world_size: int, block: int) -> BatchPlan:
    """plan_batch for text in blocks of so many tokens, of which a device takes whole ones; at least one must fit."""
    plan = plan_batch(target_tokens // block, device_tokens // block, world_size)
    return plan._replace(max_tokens=plan.max_tokens * block)
