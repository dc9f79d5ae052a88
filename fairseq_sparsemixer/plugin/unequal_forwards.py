"""Refuses flags and tasks that make one rank run a layer more often than another, if the forward is a collective.

It is one with experts sharded over ranks, and with --balance-scope global. The other ranks would wait forever, or worse,
mistake the next layer's numbers for this one's.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional

from fairseq.sequence_generator import SequenceGenerator

from fairseq_sparsemixer.errors import ConfigurationError

GENERATING_FLAGS = ("eval_bleu", "eval_wer", "eval_wer_parse", "eval_inference")  # fairseq's tasks, in validation


def refuse_unequal_forwards(cfg: Any, task: Any, remedy: str) -> None:
    """Raise ConfigurationError for flags and tasks that make the number of forwards differ between ranks."""
    for flag in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(cfg.model, flag, 0):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} {getattr(cfg.model, flag)} may skip a layer on one rank while another waits in"
                f" it; set it to 0, or {remedy}"
            )
    for flag in GENERATING_FLAGS:
        if getattr(cfg.task, flag, False):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} generates a different number of words on each rank, which leaves the others"
                f" waiting in a layer; score checkpoints with fairseq-generate, or {remedy}"
            )
    if _keeps_generator(task):
        raise ConfigurationError(
            f"--task {getattr(cfg.task, '_name', type(task).__name__)} generates in training, a different number of words on"
            f" each rank, which leaves the others waiting in a layer; {remedy}"
        )


def _keeps_generator(task: Any) -> bool:
    """Whether a task, once its model is built, holds a generator: fairseq's tasks have one only if they will use it."""
    for value in vars(task).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if any(callable(getattr(item, "generate", None)) for item in held):
            return True
    return False


@contextmanager
def refusing_generation(remedy: Optional[str]) -> Iterator[None]:
    """In this context, raise ConfigurationError if a sequence is generated; with remedy=None, allow it.

    For tasks that create a generator only in the step that needs it.
    """
    if remedy is None:
        yield
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigurationError(
            "the task generates in training, a different number of words on each rank, which leaves the others waiting in a"
            f" layer; {remedy}"
        )

    generate = SequenceGenerator._generate
    SequenceGenerator._generate = refuse
    try:
        yield
    finally:
        SequenceGenerator._generate = generate
