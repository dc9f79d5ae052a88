"""Lost ranks: how long the others wait, and the error they exit with.

fairseq creates its process groups before it builds a trainer, with torch's time-outs of many minutes. So `install` wraps
two of fairseq's functions: --collective-timeout and the error message then apply from the rendezvous on.
"""

import os
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterator, Optional

from fairseq.distributed import utils
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.ranges import SECONDS, broken_rule

LOST_CONTACT = (  # in error messages of gloo, NCCL and torch's stores
    "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "remote process exited",
)  # fmt: skip
OTHER_TIMEOUTS = ("cuda error", "dataloader")  # from this process's own device and workers

# fairseq's own functions; spawned ranks import this module first, and find them here too
fairseq_init = utils.distributed_init
fairseq_main = utils.distributed_main


def timeout_of(cfg: Any) -> Optional[timedelta]:
    """The value of --collective-timeout; None if it is not given or the model has no such flag.

    Raises ConfigurationError for a value out of range.
    """
    seconds = getattr(getattr(cfg, "model", None), "collective_timeout", None)
    if seconds is None:
        return None
    sentence = broken_rule("--collective-timeout", seconds, SECONDS, "leave it out for torch's default")
    if sentence:
        raise ConfigurationError(sentence)
    return timedelta(seconds=seconds)


def set_timeout(timeout: Optional[timedelta]) -> None:
    """Set the time-out of torch's default group and of fairseq's global group; None: unchanged. A collective."""
    if timeout is None or not dist.is_initialized():
        return
    dist.distributed_c10d._set_pg_timeout(timeout)  # torch has no public API for an existing group
    if hasattr(utils.get_global_group, "_global_group"):
        dist.distributed_c10d._set_pg_timeout(timeout, utils.get_global_group())
    else:  # fairseq would create it on first use, with torch's default
        utils.get_global_group._global_group = dist.new_group(timeout=timeout)


def distributed_init(cfg: Any) -> int:
    """See fairseq.distributed.utils; --collective-timeout applies to the rendezvous and the groups."""
    timeout = timeout_of(cfg)
    if timeout is None:
        return fairseq_init(cfg)
    made = dist.init_process_group
    dist.init_process_group = partial(made, timeout=timeout)
    try:
        rank = fairseq_init(cfg)
    finally:
        dist.init_process_group = made
    set_timeout(timeout)
    return rank


def distributed_main(i: int, main: Callable[..., None], cfg: Any, kwargs: Any) -> None:
    """See fairseq.distributed.utils; a rank that loses another exits with one sentence, wherever it was."""
    with explaining_lost_ranks(cfg):
        fairseq_main(i, main, cfg, kwargs)


@contextmanager
def explaining_lost_ranks(cfg: Any) -> Iterator[None]:
    """Raise ConfigurationError, naming the checkpoint to resume from, if another rank is lost."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        several = cfg.distributed_training.distributed_world_size > 1
        if not several or not any(sign in words for sign in LOST_CONTACT) or any(other in words for other in OTHER_TIMEOUTS):
            raise
        rank = dist.get_rank() if dist.is_initialized() else cfg.distributed_training.distributed_rank
        reason = str(error).split("\n")[0].rstrip(".")
        raise ConfigurationError(f"rank {rank} lost contact with another rank ({reason}); {_remedy(cfg)}") from None


def _remedy(cfg: Any) -> str:
    folder = Path(cfg.checkpoint.save_dir)
    if any(folder.glob("checkpoint_last*.pt")):  # with --sharded-checkpoints, checkpoint_last-rank-N.pt
        return f"restart to resume from {os.path.join(cfg.checkpoint.save_dir, 'checkpoint_last.pt')}"
    return "restart the run"


def install() -> None:
    """Make fairseq's commands start ranks through these functions, however the ranks are launched."""
    utils.distributed_init, utils.distributed_main = distributed_init, distributed_main
