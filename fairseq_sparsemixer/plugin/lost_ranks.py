"""Ranks that die or hang: how long the others wait for one, and what they say in the end.

fairseq makes its process groups before it builds a trainer, and with torch's time-outs of many minutes. So `install` puts
two functions around fairseq's own, by which --collective-timeout and the one sentence hold from the rendezvous on.
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

LOST_CONTACT = (  # in gloo's, NCCL's and the stores' words
    "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "remote process exited",
)  # fmt: skip
OTHER_TIMEOUTS = ("cuda error", "dataloader")  # of this process's own device and workers

# fairseq's own; a spawned rank, which imports this module first, finds them here as well
fairseq_init = utils.distributed_init
fairseq_main = utils.distributed_main


def timeout_of(cfg: Any) -> Optional[timedelta]:
    """What --collective-timeout says; None where it is not given, or the model has no such flag.

    Raises ConfigurationError for what is not a time to wait.
    """
    seconds = getattr(getattr(cfg, "model", None), "collective_timeout", None)
    if seconds is None:
        return None
    sentence = broken_rule("--collective-timeout", seconds, SECONDS, "leave it out for torch's default")
    if sentence:
        raise ConfigurationError(sentence)
    return timedelta(seconds=seconds)


def set_timeout(timeout: Optional[timedelta]) -> None:
    """Let every collective of torch's default group and of fairseq's wait so long; None leaves them. A collective."""
    if timeout is None or not dist.is_initialized():
        return
    dist.distributed_c10d._set_pg_timeout(timeout)  # torch has no public way once the group is made
    if hasattr(utils.get_global_group, "_global_group"):
        dist.distributed_c10d._set_pg_timeout(timeout, utils.get_global_group())
    else:  # fairseq makes it when it is first asked for, by torch's default
        utils.get_global_group._global_group = dist.new_group(timeout=timeout)


def distributed_init(cfg: Any) -> int:
    """See fairseq.distributed.utils; the rendezvous and the groups wait as --collective-timeout says."""
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
    """See fairseq.distributed.utils; a rank that loses another ends with one sentence, wherever it was."""
    with explaining_lost_ranks(cfg):
        fairseq_main(i, main, cfg, kwargs)


@contextmanager
def explaining_lost_ranks(cfg: Any) -> Iterator[None]:
    """Raise ConfigurationError, which names the checkpoint to go on from, when another rank is gone."""
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
    if any(folder.glob("checkpoint_last*.pt")):  # with --sharded-checkpoints, their names go on
        return f"start again to go on from {os.path.join(cfg.checkpoint.save_dir, 'checkpoint_last.pt')}"
    return "start again"


def install() -> None:
    """Let fairseq's commands start their ranks by these, whether they are told of each other, detected or spawned."""
    utils.distributed_init, utils.distributed_main = distributed_init, distributed_main
