"""Why there is no batch: one sentence for fairseq's "The dataset is empty"."""

from contextlib import contextmanager
from typing import Any, Iterator

from fairseq_sparsemixer.errors import ConfigurationError

EMPTY = "The dataset is empty"  # of fairseq's iterators


@contextmanager
def explaining_no_batch(subset: str, cfg: Any, task: Any) -> Iterator[None]:
    """Raise ConfigurationError where all sentences of a subset were in a last batch that this fairseq drops.

    fairseq-fixed does so with a last batch that is not a multiple of --required-batch-size-multiple; fairseq 0.12.2 keeps it.
    cfg: fairseq's dataset settings.
    """
    try:
        yield
    except Exception as error:
        multiple = cfg.required_batch_size_multiple
        if EMPTY not in str(error) or multiple <= 1 or not len(task.dataset(subset)):
            raise
        raise ConfigurationError(
            f"no batch is left of the subset {subset}: with --required-batch-size-multiple {multiple}, this fairseq drops a last"
            f" batch that is not a multiple of {multiple}; give --required-batch-size-multiple 1"
        ) from None
