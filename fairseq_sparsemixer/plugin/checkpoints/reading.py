"""Reading a checkpoint: no code of the file ever runs, and what cannot be read ends with one sentence."""

import argparse
import functools
import os
import pickle
import re
import stat
import threading
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Callable, Dict, Iterator

import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import settings
from fairseq_sparsemixer.plugin.checkpoints.arrays import NoNumbers, safe_globals
from fairseq_sparsemixer.plugin.checkpoints.layout import COPIES_OF_MODEL, layout_of, wrong_layout

REFUSED = re.compile(r"(?:GLOBAL|unrecognized function|create new object for) (\S+)")  # in torch's words
TRUSTED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own variable, for files that may run code
READERS = (  # modules of fairseq that read files named by settings or flags
    "fairseq.checkpoint_utils",
    "fairseq.data.codedataset",
    "fairseq.models.speech_to_text.xm_transformer",
    "fairseq.models.text_to_speech.vocoder",
    "fairseq.modules.quantization.pq.em",
)

_reading = threading.local()  # what this thread wants of the checkpoint that it has fairseq read


def allow_fairseq_checkpoints() -> None:
    """Let torch.load(weights_only=True) read what fairseq's checkpoints hold beside tensors.

    These are the model's arguments, and the numbers and arrays of numpy that some validation metrics (BLEU) are.
    """
    torch.serialization.add_safe_globals([argparse.Namespace, *safe_globals()])


def data_only() -> bool:
    """Whether files may hold nothing but data; not where the user trusts all of them: see TRUSTED."""
    return os.environ.get(TRUSTED, "").lower() not in ("1", "y", "yes", "true")


def read_checkpoint(path: str) -> Dict[str, Any]:
    """A fairseq checkpoint as it was saved, its tensors left in the file until they are used.

    Raises ConfigurationError for a file that is missing, cut off, no checkpoint, or holds more than data.
    """
    with one_sentence_for(path):
        refuse_special_file(path)
        state = _load_mapped(path)
        require_checkpoint(path, state)
        return state


def refuse_special_file(path: str) -> None:
    """Raise ConfigurationError for a folder, and for a pipe or device, which would be waited for without end."""
    if not str(path):
        raise ConfigurationError("the name of the checkpoint to read is empty; give a path")
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise ConfigurationError(f"{path} is {kind}; name a checkpoint file")


def require_checkpoint(path: str, state: Any) -> None:
    """Raise ConfigurationError unless `state` has the parts of a checkpoint of fairseq, each of its type, and no code."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise KeyError("model")
    for key, kind in (("extra_state", dict), ("optimizer_history", list), ("last_optimizer_state", dict), ("task_state", dict)):
        if not isinstance(state.get(key), (kind, type(None))):
            raise _unfit(path, key, f"a {type(state[key]).__name__}, not a {kind.__name__}")
    for key in COPIES_OF_MODEL:
        if not isinstance((state.get("extra_state") or {}).get(key, {}), dict):
            raise _unfit(path, key, "no dictionary of tensors")
    history = state.get("optimizer_history") or []
    if not all(isinstance(entry, dict) and isinstance(entry.get("num_updates", 0), int) for entry in history):
        raise _unfit(path, "optimizer_history", "not a list of what each run did")
    _require_optimizer_state(path, state.get("last_optimizer_state") or {"state": {}, "param_groups": []})
    problem = wrong_layout(state)
    if problem:
        raise _unfit(path, *problem)
    settings.refuse_code(path, state)


def _require_optimizer_state(path: str, optimizer: Dict[str, Any]) -> None:
    """Of torch's optimizers; fairseq's own for sharded data parallelism keep theirs otherwise, and are left alone."""
    entries, groups = optimizer.get("state", {}), optimizer.get("param_groups", [])
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise _unfit(path, "last_optimizer_state", "without a dictionary of states for each parameter")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _unfit(path, "last_optimizer_state", "without a list of groups of parameters")


def _unfit(path: str, key: str, problem: str) -> ConfigurationError:
    return ConfigurationError(f"{path} is not a fairseq checkpoint: its {key} is {problem}; use another file")


def _load_mapped(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=data_only(), mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=data_only())  # torch < 1.6 wrote it


@contextmanager
def one_sentence_for(path: str) -> Iterator[None]:
    """What torch and fairseq raise for an unusable file, as ConfigurationError."""
    try:
        yield
    except ConfigurationError as error:
        if error.message.startswith("the checkpoint"):  # said by what is handed the state alone
            raise ConfigurationError(error.message.replace("the checkpoint", f"the checkpoint {path}", 1)) from None
        raise
    except FileNotFoundError:
        raise ConfigurationError(f"{path} does not exist; give the name of a checkpoint that does") from None
    except pickle.UnpicklingError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise ConfigurationError(f"{path} is not a checkpoint, or is truncated; use another file") from None
        raise _more_than_data(path, refused.group(1)) from None
    except NoNumbers as error:
        raise _more_than_data(path, str(error)) from None
    except (RuntimeError, EOFError, ValueError, OSError, MemoryError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is cut off, damaged, or no checkpoint ({reason}); use another file") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is not a fairseq checkpoint: {reason} is missing or unfit; use another file") from None


def _more_than_data(path: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} holds more than tensors and settings ({found}): not loaded, as that would run code of the file;"
        f" if you trust it, set {TRUSTED}=1"
    )


class _Torch(ModuleType):
    """torch, whose load is of data alone: what modules of fairseq that read files get in its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        """torch.load. Inside `_guarded`, the checkpoint is examined before fairseq looks at it, and may be mapped."""
        if getattr(_reading, "mapped", False):
            state = _load_mapped(file.name)  # torch maps paths, not open files; mapped tensors are on the CPU
        else:
            state = torch.load(file, map_location=map_location, **{**options, "weights_only": data_only()})
        if getattr(_reading, "path", None) is not None:
            require_checkpoint(_reading.path, state)
        return state


@contextmanager
def _for_this_thread(**wanted: Any) -> Iterator[None]:
    before = {name: getattr(_reading, name, None) for name in wanted}
    _reading.__dict__.update(wanted)
    try:
        yield
    finally:
        _reading.__dict__.update(before)


@contextmanager
def changed_by(change: Callable[[Dict[str, Any]], Dict[str, Any]]) -> Iterator[None]:
    """For this while, what this thread has fairseq read from a checkpoint goes through `change`."""
    with _for_this_thread(change=change):
        yield


def _guarded(function: Callable) -> Callable:
    @functools.wraps(function)
    def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
        # where all ranks read the same file at once, each takes only its own part of it into memory
        on_all_ranks = options.get("load_on_all_ranks", False)
        with one_sentence_for(path):
            refuse_special_file(path)
            with _for_this_thread(path=path, mapped=on_all_ranks):
                state = function(path, *arguments, **options)
            if layout_of(state)["size"] > 1 and not on_all_ranks:
                raise ConfigurationError(
                    f"{path} is one file of a sharded checkpoint, without the experts of other ranks;"
                    " make one file of all: fairseq-sparsemixer reshard IN OUT --portable"
                )
            _drop_copies(state)
        change = getattr(_reading, "change", None)
        return state if change is None else change(state)

    return guarded


def _drop_copies(state: Dict[str, Any]) -> None:
    """Leave out what fairseq 0.12.2's encoder layers hold twice, where the installed fairseq's do not know it."""
    from fairseq_sparsemixer.plugin.models.fast_path import knows_copies, without_copies  # models import this module

    if isinstance(state.get("model"), dict) and not knows_copies():
        state["model"] = without_copies(state["model"])


def read_data_only(module: ModuleType) -> None:
    """Have a module of fairseq that reads files read them as data, which runs no code."""
    if module.__name__ in READERS:
        module.torch = _Torch("torch")  # type: ignore[attr-defined]  # each of these imports it


def install() -> None:
    """Make fairseq read checkpoints this way: in fairseq-train, -generate, -validate and all others."""
    for name in ("load_checkpoint_to_cpu", "load_ema_from_checkpoint"):
        function = getattr(checkpoint_utils, name)
        if not hasattr(function, "__wrapped__"):
            setattr(checkpoint_utils, name, _guarded(function))
