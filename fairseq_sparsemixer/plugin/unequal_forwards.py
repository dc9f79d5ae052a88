"""What would have one rank run a layer more often than another, where a layer's forward is a collective of all.

So it is with experts spread over ranks, and with --balance-scope global. The others would wait for ever, or worse: take
the next layer's numbers for this one's.
"""

from contextlib import contextmanager
from typing import Any, Iterator, Optional

from fairseq.sequence_generator import SequenceGenerator

from fairseq_sparsemixer.errors import ConfigurationError

GENERATING_FLAGS = ("eval_bleu", "eval_wer", "eval_wer_parse", "eval_inference")  # of fairseq's tasks, for validation


def refuse_unequal_forwards(cfg: Any, task: Any, remedy: str) -> None:
    """Raise ConfigurationError for flags and tasks by which the number of forwards differs between ranks."""
    for flag in ("encoder_layerdrop", "decoder_layerdrop"):
        if getattr(cfg.model, flag, 0):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} {getattr(cfg.model, flag)} may skip a layer on one rank while another waits in"
                f" it; set it to 0, or {remedy}"
            )
    for flag in GENERATING_FLAGS:
        if getattr(cfg.task, flag, False):
            raise ConfigurationError(
                f"--{flag.replace('_', '-')} generates as many words on each rank as its own sentences need, while the others"
                f" wait in a layer; score checkpoints with fairseq-generate, or {remedy}"
            )
    if _keeps_generator(task):
        raise ConfigurationError(
            f"--task {getattr(cfg.task, '_name', type(task).__name__)} generates in training, as many words on each rank as its"
            f" own sentences need, while the others wait in a layer; {remedy}"
        )


def _keeps_generator(task: Any) -> bool:
    """Whether a task, whose model is built, has something to generate with: fairseq's have it only where they will."""
    for value in vars(task).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        if any(callable(getattr(item, "generate", None)) for item in held):
            return True
    return False


@contextmanager
def refusing_generation(remedy: Optional[str]) -> Iterator[None]:
    """For this while, raise ConfigurationError where a sequence is generated; with None as remedy, let it be.

    For tasks that make a generator only in the step that needs it.
    """
    if remedy is None:
        yield
        return

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigurationError(
            "the task generates in training, as many words on each rank as its own sentences need, while the others wait in a"
            f" layer; {remedy}"
        )

    generate = SequenceGenerator._generate
    SequenceGenerator._generate = refuse
    try:
        yield
    finally:
        SequenceGenerator._generate = generate
