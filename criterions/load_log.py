"""Logs the tokens per expert during training, one JSON line every few updates, for the load plots."""

import json
import logging
from pathlib import Path
from typing import Any, Dict, List, Optional

from torch import Tensor
from torch import distributed as dist

from fairseq_sparsemixer.errors import ConfigurationError

logger = logging.getLogger(__name__)


class LoadLog:
    """Sums loads over `interval` updates and appends `{"num_updates", "layers", "load"}` to the file, on rank 0.

    load is [layers][experts], the tokens of each expert of a layer since the previous line. With the names of languages, a line
    also has `languages` and `language_load`, [layers][languages][experts], which sums to load. Raises ConfigurationError if the
    file cannot be written at the start. If a later write fails, the training goes on with a warning.
    """

    def __init__(self, path: str, interval: int, languages: Optional[List[str]] = None):
        self.path, self.interval, self.languages = Path(path), interval, languages
        self.layers: List[str] = []
        self.num_updates: Optional[int] = None
        self.sum: Optional[Tensor] = None
        self.language_sum: Optional[Tensor] = None
        self.separator = ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigurationError(f"--moe-load-file {path} cannot be written ({error.strerror}); give another path") from None

    def watch(self, layers: List[str], num_updates: Optional[int]) -> None:
        """Set the layers and the update of the next loads; None means validation, which is not logged."""
        self.layers, self.num_updates = layers, num_updates

    def add(self, load: Tensor, language_load: Optional[Tensor] = None) -> None:
        """load [L, E] and language_load [L, N, E] of one update, summed over ranks; load is NaN beyond a layer's experts."""
        if self.num_updates is None:
            return
        self.sum = load if self.sum is None else self.sum + load
        if language_load is not None:
            self.language_sum = language_load if self.language_sum is None else self.language_sum + language_load
        done = self.num_updates + 1
        if done % self.interval == 0:
            self._write(done)

    def _write(self, num_updates: int) -> None:
        load, self.sum = self.sum, None
        by_language, self.language_sum = self.language_sum, None
        if load is None or dist.is_initialized() and dist.get_rank() != 0:
            return
        counts = [layer[~layer.isnan()].round().long().tolist() for layer in load]
        line: Dict[str, Any] = {"num_updates": num_updates, "layers": self.layers, "load": counts}
        if self.languages is not None and by_language is not None:
            line.update(_by_language(self.languages, by_language, [len(layer) for layer in counts]))
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self.separator + json.dumps(line) + "\n")
            self.separator = ""
        except OSError as error:
            self.separator = "\n"  # a part of the line may be there
            logger.warning("--moe-load-file %s lacks update %d (%s); make room there", self.path, num_updates, error.strerror)


def _by_language(names: List[str], load: Tensor, num_experts: List[int]) -> Dict[str, Any]:
    """The entries of a line for load [L, N, E]; languages without a token are left out."""
    rows = load.round().long().tolist()
    seen = [index for index in range(len(names)) if any(sum(layer[index]) for layer in rows)]
    counts = [[layer[index][:size] for index in seen] for layer, size in zip(rows, num_experts)]
    return {"languages": [names[index] for index in seen], "language_load": counts}
