"""Reading a checkpoint: no code of the file ever runs, and what cannot be read ends with one sentence."""

import argparse
import functools
import pickle
import re
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator

import numpy
import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.checkpoints.layout import layout_of
from fairseq_sparsemixer.errors import ConfigurationError

load = torch.load
REFUSED = re.compile(r"(?:GLOBAL|unrecognized function|create new object for) (\S+)")  # in torch's words


def allow_fairseq_checkpoints() -> None:
    """Let torch.load(weights_only=True) read what fairseq's checkpoints hold beside tensors.

    These are the model's arguments, and the numpy numbers that some validation metrics (BLEU) are.
    """
    numbers = [numpy.float64(0), numpy.float32(0), numpy.int64(0)]
    rebuild_number = numbers[0].__reduce__()[0]
    torch.serialization.add_safe_globals(
        [argparse.Namespace, rebuild_number, numpy.dtype, *(type(number.dtype) for number in numbers)]
    )


def read_checkpoint(path: str) -> Dict[str, Any]:
    """A fairseq checkpoint as it was saved, its tensors left in the file until they are used.

    Raises ConfigurationError for a file that is missing, cut off, no checkpoint, or holds more than data.
    """
    with one_sentence_for(path):
        state = _load_mapped(path)
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise KeyError("model")
        return state


def _load_mapped(path: str, **options: Any) -> Any:
    try:
        return load(path, weights_only=True, mmap=True, **{"map_location": "cpu", **options})
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return load(path, weights_only=True, **{"map_location": "cpu", **options})  # torch < 1.6 wrote it


@contextmanager
def one_sentence_for(path: str) -> Iterator[None]:
    """What torch and fairseq raise for an unusable file, as ConfigurationError."""
    try:
        yield
    except ConfigurationError:
        raise
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist") from None
    except pickle.UnpicklingError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise ConfigurationError(f"{path} is no checkpoint, or only a part of one") from None
        raise ConfigurationError(
            f"{path} holds more than tensors and settings ({refused.group(1)}): not loaded, as that would run code of the file"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"{path} is no checkpoint of fairseq: {error} is missing or unfit") from None
    except (RuntimeError, EOFError, ValueError, OSError, UnicodeDecodeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is cut off, damaged, or no checkpoint ({reason})") from None


@contextmanager
def _data_only(mapped: bool) -> Iterator[None]:
    """For this while, torch.load is weights_only whatever torch's version; mapped: tensors stay in the file until used."""

    def load_data(file: Any, map_location: Any = None) -> Any:
        if mapped:
            return _load_mapped(file.name)  # torch maps paths, not open files; mapped tensors are on the CPU
        return load(file, map_location=map_location, weights_only=True)

    torch.load = load_data
    try:
        yield
    finally:
        torch.load = load


def _guarded(function: Callable) -> Callable:
    @functools.wraps(function)
    def guarded(path: str, *arguments: Any, **options: Any) -> Any:
        # where all ranks read the same file at once, each takes only its own part of it into memory
        on_all_ranks = options.get("load_on_all_ranks", False)
        with one_sentence_for(path), _data_only(mapped=on_all_ranks):
            state = function(path, *arguments, **options)
            if layout_of(state)["size"] > 1 and not on_all_ranks:
                raise ConfigurationError(
                    f"{path} is one file of a sharded checkpoint, without the experts of other ranks;"
                    " make one file of all: fairseq-sparsemixer reshard IN OUT --portable"
                )
            return state

    return guarded


def install() -> None:
    """Make fairseq read checkpoints this way: in fairseq-train, -generate, -validate and all others."""
    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        function = getattr(checkpoint_utils, name)
        if not hasattr(function, "__wrapped__"):
            setattr(checkpoint_utils, name, _guarded(function))
