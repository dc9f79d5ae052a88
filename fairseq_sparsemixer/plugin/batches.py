"""Explains fairseq's error "The dataset is empty" in one sentence."""

from contextlib import contextmanager
from typing import Any, Iterator

from fairseq_sparsemixer.errors import ConfigurationError

EMPTY = "The dataset is empty"  # from fairseq's iterators


@contextmanager
def explaining_no_batch(subset: str, cfg: Any, task: Any) -> Iterator[None]:
    """Raise ConfigurationError if all sentences of a subset were in a last batch that the installed fairseq drops.

    fairseq-fixed drops a last batch that is not a multiple of --required-batch-size-multiple; fairseq 0.12.2 keeps it.
    cfg: fairseq's dataset settings.
    """
    try:
        yield
    except Exception as error:
        multiple = cfg.required_batch_size_multiple
        if EMPTY not in str(error) or multiple <= 1 or not len(task.dataset(subset)):
            raise
        raise ConfigurationError(
            f"the subset {subset} has no batch left: with --required-batch-size-multiple {multiple}, this fairseq drops a last"
            f" batch that is not a multiple of {multiple}; give --required-batch-size-multiple 1"
        ) from None
