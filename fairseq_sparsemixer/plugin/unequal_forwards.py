"""Settings and tasks that make one rank run a layer more often than another, if the forward is a collective.

It is one with experts sharded over ranks, and with --balance-scope global. The other ranks would wait forever, or worse,
mistake the next layer's numbers for this one's. Generation by fairseq's SequenceGenerator takes turns; all else is refused.
"""

import functools
from contextlib import contextmanager
from typing import Any, Callable, Iterator, Optional
from unittest.mock import patch

from fairseq.sequence_generator import SequenceGenerator

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.layer import moe_layers
from fairseq_sparsemixer.moe.turns import balancing_alone, taking_turns

GENERATING_FLAGS = ("eval_wer", "eval_wer_parse", "eval_inference")  # of tasks with generators of their own, in validation


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
    generator = _other_generator(task)
    if generator is not None:
        raise ConfigurationError(
            f"--task {getattr(cfg.task, '_name', type(task).__name__)} generates in training by a {type(generator).__name__}, a"
            f" different number of words on each rank, which leaves the others waiting in a layer; {remedy}"
        )


def _other_generator(task: Any) -> Optional[Any]:
    """A generator that a task, once its model is built, holds and that is not fairseq's SequenceGenerator."""
    for value in vars(task).values():
        held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
        for item in held:
            if callable(getattr(item, "generate", None)) and not isinstance(item, SequenceGenerator):
                return item
    return None


@contextmanager
def generating_together(ranks_wait: bool) -> Iterator[None]:
    """In this context, ranks that wait for each other in a layer may generate different numbers of words.

    Every rank must call a SequenceGenerator equally often; a call ends when those of all ranks have. ranks_wait=False: the
    ranks do not wait for each other, and nothing is changed.
    """
    if not ranks_wait:
        yield
        return
    with patch.object(SequenceGenerator, "_generate", _in_turns(SequenceGenerator._generate)):
        yield


@contextmanager
def refusing_generation(why: str) -> Iterator[None]:
    """In this context, raise ConfigurationError if a sequence is generated; why: a clause on the task, with the remedy."""

    def refuse(*_: Any, **__: Any) -> None:
        raise ConfigurationError(f"the task generates in training, {why}")

    with patch.object(SequenceGenerator, "_generate", refuse):
        yield


def _in_turns(generate: Callable) -> Callable:
    @functools.wraps(generate)
    def together(self: SequenceGenerator, *arguments: Any, **options: Any) -> Any:
        layers = moe_layers(self.model)
        with balancing_alone(layers), taking_turns(layers):
            return generate(self, *arguments, **options)

    return together
