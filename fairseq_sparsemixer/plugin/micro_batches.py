"""The sums of a rank whose batches end within an update of several micro-batches.

fairseq gives each rank as many batches as the first has; the missing ones at the end are empty, and run as a copy of an old
batch without a gradient. If an update's last micro-batch is one of them, fairseq leaves out the rank's sample size and logging
outputs of the whole update, but not its gradients, which are then divided by too little.
"""

from typing import Any, Dict, List, NamedTuple, Sequence

import torch


class Sums(NamedTuple):
    """What a rank adds to the sums of an update. ignored: it has no batch, and the logging outputs count for nothing."""

    logging_outputs: List[Dict[str, Any]]
    sample_size: Any
    ignored: bool


def of_own_batches(samples: Sequence[Any], sums: Sums) -> Sums:
    """The sums of the micro-batches that are not empty, if fairseq ignores the rank although it has some.

    samples: the micro-batches. sums: as fairseq made them, with a sample size of zero if ignored. They stay as they are if
    a batch was left out for lack of memory, or if the criterion does not log its sample size.
    """
    own = [sample is not None and len(sample) > 0 for sample in samples]
    outputs = sums.logging_outputs
    if not sums.ignored or not any(own) or len(own) != len(outputs) or any("sample_size" not in output for output in outputs):
        return sums
    kept = [output for output, counts in zip(outputs, own) if counts]
    sizes = [output["sample_size"] for output in kept]
    total = sum(sizes)
    # of the same type as that of the other ranks
    return Sums(kept, sums.sample_size + total if torch.is_tensor(sums.sample_size) else float(total), False)
