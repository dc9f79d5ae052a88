"""Logs the tokens per expert during training, one JSON line every few updates, for the load plots."""

import json
import logging
from pathlib import Path
from typing import List, Optional

from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError

logger = logging.getLogger(__name__)


class LoadLog:
    """Sums loads over `interval` updates and appends `{"num_updates", "layers", "load"}` to the file, on rank 0.

    load is [layers][experts], the tokens of each expert of a layer since the previous line. Raises ConfigurationError if the file
    cannot be written at the start. If a later write fails, the training goes on with a warning.
    """

    def __init__(self, path: str, interval: int):
        self.path, self.interval = Path(path), interval
        self.layers: List[str] = []
        self.num_updates: Optional[int] = None
        self.sum: Optional[Tensor] = None
        self.separator = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigurationError(f"--moe-load-file {path} cannot be written ({error.strerror}); give another path") from None

    def watch(self, layers: List[str], num_updates: Optional[int]) -> None:
        """Set the layers and the update of the next loads; None means validation, which is not logged."""
        self.layers, self.num_updates = layers, num_updates

    def add(self, load: Tensor) -> None:
        """load [L, E] of one update, summed over ranks; NaN beyond a layer's experts."""
        if self.num_updates is None:
            return
        self.sum = load if self.sum is None else self.sum + load
        done = self.num_updates + 1
        if done % self.interval == 0:
            self._write(done)

    def _write(self, num_updates: int) -> None:
        load, self.sum = self.sum, None
        if load is None or dist.is_initialized() and dist.get_rank() != 0:
            return
        counts = [layer[~layer.isnan()].round().long().tolist() for layer in load]
        line = {"num_updates": num_updates, "layers": self.layers, "load": counts}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.separator + json.dumps(line) + "\n")
            self.separator = ""
        except OSError as error:
            self.separator = "\n"  # a part of the line may be there
            logger.warning("--moe-load-file %s lacks update %d (%s); make room there", self.path, num_updates, error.strerror)
