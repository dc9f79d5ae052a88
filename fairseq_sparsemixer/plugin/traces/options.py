"""Puts --moe-trace and --moe-replay among the flags that all of fairseq's commands share.

They become fields of fairseq's CommonConfig, so they are in --help and in `cfg.common`, which travels to spawned ranks.
fairseq-hydra-train composes its configuration before it reads the user-dir: there, write ++common.moe_trace=FILE.
"""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Tuple

from fairseq.dataclass.configs import CommonConfig
from fairseq.dataclass.initialize import hydra_init
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.options import TraceOptions
from fairseq_sparsemixer.plugin.traces.files import TraceWriter, rank_file, rank_files
from fairseq_sparsemixer.plugin.traces.following import Following
from fairseq_sparsemixer.plugin.traces.replay import Replay
from fairseq_sparsemixer.ranges import NOT_NEGATIVE, broken_rule

WEIGHTS = ("trace", "model")


class Wanted(NamedTuple):
    """The values of the flags."""

    trace: Optional[str]
    interval: int
    replay: Optional[str]
    weights: str


def wanted(cfg: Any) -> Optional[Wanted]:
    """The flags in a command's settings; None without --moe-trace and --moe-replay. Raises ConfigurationError for bad values."""
    common = getattr(cfg, "common", cfg)  # fairseq's commands also take a flat Namespace
    values: Dict[str, Any] = {option.name: getattr(common, option.name, option.default) for option in fields(TraceOptions)}
    for name in ("moe_trace", "moe_replay"):
        if values[name] == "":
            raise ConfigurationError(f"--{name.replace('_', '-')} '' is empty; give a file, or leave it out")
    if values["moe_replay"] is None and values["moe_replay_weights"] != WEIGHTS[0]:
        raise ConfigurationError(f"--moe-replay-weights {values['moe_replay_weights']} needs a trace; give --moe-replay, too")
    interval = values["moe_trace_interval"]
    if values["moe_trace"] is None and interval != TraceOptions.moe_trace_interval:
        raise ConfigurationError(f"--moe-trace-interval {interval} needs a file to write to; give --moe-trace, too")
    if values["moe_trace"] is None and values["moe_replay"] is None:
        return None
    sentence = broken_rule("--moe-trace-interval", interval, NOT_NEGATIVE)
    if sentence:
        raise ConfigurationError(sentence)
    if values["moe_replay_weights"] not in WEIGHTS:
        raise ConfigurationError(f"--moe-replay-weights {values['moe_replay_weights']} must be {' or '.join(WEIGHTS)}")
    return Wanted(*values.values())


def open_following(flags: Wanted, shard: Tuple[int, int] = (0, 1)) -> Following:
    """Open the files. Raises ConfigurationError if one cannot be used.

    shard: which of how many processes this is, of those that share the data without a process group.
    """
    several = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else shard
    if flags.trace is not None and flags.replay is not None and world_size > 1:
        _refuse_same_files(flags.trace, flags.replay, world_size)
    replay = None if flags.replay is None else Replay(flags.replay)  # read before the trace replaces it
    trace = None if flags.trace is None else TraceWriter(flags.trace, rank, world_size)
    return Following(trace, replay, own_weights=flags.weights == "model")


def _refuse_same_files(trace: str, replay: str, world_size: int) -> None:
    """Raise ConfigurationError if a rank could replace or remove a file of the replay that another one still reads."""
    written = [Path(trace), *(rank_file(Path(trace), rank) for rank in range(world_size)), *rank_files(Path(trace)).values()]
    read = [Path(replay), *rank_files(Path(replay)).values()]
    if {os.path.realpath(path) for path in written} & {os.path.realpath(path) for path in read}:
        raise ConfigurationError(
            f"--moe-trace {trace} would replace files of --moe-replay {replay} that other ranks read; give it another file"
        )


def install() -> None:
    """Add the fields, and register the larger CommonConfig with hydra again."""
    new = [option for option in fields(TraceOptions) if option.name not in CommonConfig.__dataclass_fields__]
    for option in new:
        CommonConfig.__dataclass_fields__[option.name] = option
        CommonConfig.__annotations__[option.name] = option.type
        setattr(CommonConfig, option.name, option.default)
    if new:
        hydra_init()
