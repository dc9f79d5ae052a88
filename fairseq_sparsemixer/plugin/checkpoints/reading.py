"""Reading checkpoints: code in the file never runs, and an unreadable file gives a one-sentence error."""

import argparse
import functools
import os
import pickle
import re
import stat
import threading
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

import torch
from fairseq import checkpoint_utils

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints import settings
from fairseq_sparsemixer.plugin.checkpoints.arrays import NoNumbers, safe_globals
from fairseq_sparsemixer.plugin.checkpoints.layout import in_several_files, layout_of, shard_path, wrong_copy, wrong_layout
from fairseq_sparsemixer.plugin.checkpoints.model_settings import model_settings

REFUSED = re.compile(r"(?:GLOBAL|unrecognized function|create new object for) (\S+)")  # from torch's error messages
TRUSTED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own variable, for files that may run code
BRANCH = re.compile(r"\.moe_layer\.(?:gate\.wg|experts\.\d+\.fc[12])\.")  # in names of parameters of fairseq's branches
OF_A_SET = re.compile(r"-(?:rank-\d+|shared)(?:-shard\d+)?\.pt$")  # the end of a file's name there
READERS = (  # fairseq modules that read files named by settings or flags
    "fairseq.checkpoint_utils",
    "fairseq.data.codedataset",
    "fairseq.models.speech_to_text.xm_transformer",
    "fairseq.models.text_to_speech.vocoder",
    "fairseq.modules.quantization.pq.em",
)

_reading = threading.local()  # this thread's options for the checkpoint that fairseq is reading


def allow_fairseq_checkpoints() -> None:
    """Let torch.load(weights_only=True) read the non-tensor content of fairseq's checkpoints.

    This is the model's arguments, and the numpy numbers and arrays of some validation metrics (BLEU).
    """
    torch.serialization.add_safe_globals([argparse.Namespace, *safe_globals()])


def data_only() -> bool:
    """Whether files may hold only data; False if the user trusts all files: see TRUSTED."""
    return os.environ.get(TRUSTED, "").lower() not in ("1", "y", "yes", "true")


def read_checkpoint(path: str, of_branch: bool = False) -> Dict[str, Any]:
    """Load a fairseq checkpoint as it was saved; tensors are memory-mapped until used.

    of_branch: whether it may be a file of fairseq's branches moe and nllb. Raises ConfigurationError for one otherwise, and for
    a file that is missing, truncated, not a checkpoint, or holds more than data.
    """
    with one_sentence_for(path):
        refuse_special_file(path)
        state = _load_mapped(path)
        require_checkpoint(path, state)
        if not of_branch and is_of_branch(state["model"]):
            raise _convert_first(path)
        return state


def is_of_branch(names: Iterable[str]) -> bool:
    """Whether a model with these parameters is from fairseq's branches moe and nllb."""
    return any(BRANCH.search(name) for name in names)


def _convert_first(path: str) -> ConfigurationError:
    whole = OF_A_SET.sub(".pt", str(path))
    return ConfigurationError(
        f"{path} is from fairseq's branch moe or nllb, of a set of files; convert them first: fairseq-sparsemixer convert"
        f" {whole} OUT.pt"
    )


def refuse_special_file(path: str) -> None:
    """Raise ConfigurationError for a folder, and for a pipe or device, on which reading could block forever."""
    if not str(path):
        raise ConfigurationError("the name of the checkpoint to read is empty; give a path")
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        kind = "a folder" if os.path.isdir(path) else "a pipe or device"
        raise ConfigurationError(f"{path} is {kind}; name a checkpoint file")


def require_checkpoint(path: str, state: Any) -> None:
    """Raise ConfigurationError unless `state` has the parts of a fairseq checkpoint, with the right types and no code."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise KeyError("model")
    for key, kind in (("extra_state", dict), ("optimizer_history", list), ("last_optimizer_state", dict), ("task_state", dict)):
        if not isinstance(state.get(key), (kind, type(None))):
            raise _unfit(path, key, f"a {type(state[key]).__name__}, not a {kind.__name__}")
    history = state.get("optimizer_history") or []
    if not all(isinstance(entry, dict) and isinstance(entry.get("num_updates", 0), int) for entry in history):
        raise _unfit(path, "optimizer_history", "not a list of what each run did")
    _require_optimizer_state(path, state.get("last_optimizer_state") or {"state": {}, "param_groups": []})
    problem = wrong_layout(state) or wrong_copy(state) or _wrong_position(state)
    if problem:
        raise _unfit(path, *problem)
    settings.refuse_code(path, state)


def _require_optimizer_state(path: str, optimizer: Dict[str, Any]) -> None:
    """Check a torch optimizer's state; fairseq's sharded data parallelism uses another format, which is not checked."""
    entries, groups = optimizer.get("state", {}), optimizer.get("param_groups", [])
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise _unfit(path, "last_optimizer_state", "without a dictionary of states for each parameter")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise _unfit(path, "last_optimizer_state", "without a list of groups of parameters")


def _wrong_position(state: Dict[str, Any]) -> Optional[Tuple[str, str]]:
    """The entry of the position in the data and what is wrong with it; None if it has numbers, or is missing."""
    position = (state.get("extra_state") or {}).get("train_iterator", {})
    if not isinstance(position, dict):
        return "train_iterator", f"a {type(position).__name__}, not a dict"
    for name in ("epoch", "iterations_in_epoch"):
        if not isinstance(position.get(name, 0), int):
            return "train_iterator", f"at {name} {position[name]!r}, which is not a number"
    return None


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
    """Turn the errors of torch and fairseq for an unusable file into ConfigurationError."""
    try:
        yield
    except ConfigurationError as error:
        if error.message.startswith("the checkpoint"):  # raised by code that does not know the path
            raise ConfigurationError(error.message.replace("the checkpoint", f"the checkpoint {path}", 1)) from None
        raise
    except FileNotFoundError:
        raise _missing(str(path)) from None
    except pickle.UnpicklingError as error:
        refused = REFUSED.search(str(error))
        if refused is None:
            raise ConfigurationError(f"{path} is not a checkpoint, or is truncated; use another file") from None
        raise _more_than_data(path, refused.group(1)) from None
    except NoNumbers as error:
        raise _more_than_data(path, str(error)) from None
    except (RuntimeError, EOFError, ValueError, OSError, MemoryError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is truncated, damaged, or not a checkpoint ({reason}); use another file") from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} is not a fairseq checkpoint: {reason} is missing or wrong; use another file") from None


def _missing(path: str) -> ConfigurationError:
    if in_several_files(path):
        return ConfigurationError(
            f"{path} is a checkpoint in several files ({shard_path(path, 0)}, ...); make one of them:"
            f" fairseq-sparsemixer reshard {path} OUT --portable"
        )
    return ConfigurationError(f"{path} does not exist; give the path of an existing checkpoint")


def _more_than_data(path: str, found: str) -> ConfigurationError:
    return ConfigurationError(
        f"{path} holds more than tensors and settings ({found}): not loaded, as that would run code from the file;"
        f" if you trust it, set {TRUSTED}=1"
    )


class _Torch(ModuleType):
    """Replaces torch in fairseq modules that read files: its load accepts only data."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def load(file: Any, map_location: Any = None, **options: Any) -> Any:
        """See torch.load. Inside `_guarded`, checks the checkpoint before fairseq uses it, and may memory-map it."""
        if getattr(_reading, "mapped", False):
            state = _load_mapped(file.name)  # torch maps paths, not open files; mapped tensors stay on the CPU
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
    """In this context, apply `change` to checkpoints that fairseq reads in this thread."""
    with _for_this_thread(change=change):
        yield


def _guarded(function: Callable) -> Callable:
    @functools.wraps(function)
    def guarded(path: Any, *arguments: Any, **options: Any) -> Any:
        # if all ranks read the same file, mapping it loads only each rank's own part into memory
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
            if isinstance(state.get("model"), dict) and is_of_branch(state["model"]) and not _of_another_package(state):
                raise _convert_first(path)
            _drop_copies(state)
        change = getattr(_reading, "change", None)
        return state if change is None else change(state)

    return guarded


def _of_another_package(state: Dict[str, Any]) -> bool:
    """Whether the checkpoint's model is registered, and not one of fairseq's, which has no experts under the branches' names."""
    from fairseq.models import ARCH_MODEL_REGISTRY  # models import this module

    settings = model_settings(state)
    model = ARCH_MODEL_REGISTRY.get(settings.get("arch") or settings.get("_name"))
    return model is not None and not model.__module__.startswith("fairseq.")


def _joined_first(function: Callable) -> Callable:
    """load_model_ensemble_and_task, which looks for each file before it reads it."""

    @functools.wraps(function)
    def loading(filenames: Any, *arguments: Any, **options: Any) -> Any:
        try:
            return function(filenames, *arguments, **options)
        except OSError:
            for path in map(str, filenames):
                if in_several_files(path):
                    raise _missing(path) from None
            raise

    return loading


def _drop_copies(state: Dict[str, Any]) -> None:
    """Remove the duplicate weights of fairseq 0.12.2's encoder layers if the installed fairseq does not know them."""
    from fairseq_sparsemixer.plugin.models.fast_path import knows_copies, without_copies  # models import this module

    if isinstance(state.get("model"), dict) and not knows_copies():
        state["model"] = without_copies(state["model"])


def read_data_only(module: ModuleType) -> None:
    """Make a fairseq module that reads files load only data, so that no code runs."""
    if module.__name__ in READERS:
        module.torch = _Torch("torch")  # type: ignore[attr-defined]  # each of these imports it


def install() -> None:
    """Make fairseq read checkpoints this way, in fairseq-train, -generate, -validate and all other commands."""
    wrappers = {
        "load_checkpoint_to_cpu": _guarded,
        "load_ema_from_checkpoint": _guarded,
        "load_model_ensemble_and_task": _joined_first,
    }
    for name, wrapper in wrappers.items():
        function = getattr(checkpoint_utils, name)
        if not hasattr(function, "__wrapped__"):
            setattr(checkpoint_utils, name, wrapper(function))
