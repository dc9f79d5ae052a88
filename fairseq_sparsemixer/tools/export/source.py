"""The checkpoint to export: its settings with all defaults, and its weights, of which none may be left over."""

import argparse
import copy
import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Sequence

import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_NAME_REGISTRY, MODEL_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE
from fairseq_sparsemixer.options import MoEOptions
from fairseq_sparsemixer.plugin.checkpoints.layout import refuse_one_of_several
from fairseq_sparsemixer.plugin.checkpoints.merging import refuse_adapters
from fairseq_sparsemixer.plugin.checkpoints.model_settings import as_dict
from fairseq_sparsemixer.plugin.checkpoints.reading import one_sentence_for, read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.skeleton import BUFFER
from fairseq_sparsemixer.plugin.models.architectures import fill_defaults
from fairseq_sparsemixer.plugin.models.fast_path import without_copies


@dataclass
class Lazy:
    """A tensor of the export that is made when it is written, its size in bytes, and its number of values."""

    make: Callable[[], Tensor]
    size: int
    values: int


def as_is(tensor: Tensor) -> Lazy:
    """A tensor that is written unchanged; it stays in the checkpoint's file until then."""
    return made(tensor.contiguous, tensor.shape, tensor.dtype)


def made(make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Lazy:
    """A tensor of this shape and type that `make` returns."""
    values = math.prod(shape)
    return Lazy(make, values * dtype.itemsize, values)


@dataclass
class Export:
    """What is written: the class in transformers, its config, the tensors by their names there, and the generation config."""

    model: str
    config: Dict[str, Any]
    tensors: Dict[str, Lazy]
    generation: Dict[str, Any]


class Weights:
    """A model's tensors by name, each to be taken once."""

    def __init__(self, tensors: Dict[str, Tensor]):
        self.left = {name: tensor for name, tensor in tensors.items() if not BUFFER.fullmatch(name)}

    def take(self, name: str) -> Tensor:
        """Raises ConfigurationError if there is no tensor of that name."""
        if name not in self.left:
            raise ConfigurationError(f"the checkpoint has no {name}, which its flags require; use an unchanged checkpoint")
        return self.left.pop(name)

    def move(self, modules: Iterable[str], source: str, target: str, names: Dict[str, str]) -> Dict[str, Lazy]:
        """Take weight and bias of these modules, of the layer `source`; they are named after `target`, by `names` if there."""
        return {
            f"{target}{names.get(module, module)}.{part}": as_is(self.take(f"{source}{module}.{part}"))
            for module in modules
            for part in ("weight", "bias")
        }

    def refuse_rest(self, model: str) -> None:
        """Raise ConfigurationError, naming one, if tensors are left."""
        if self.left:
            raise ConfigurationError(f"the checkpoint has {next(iter(self.left))}, which {model} has no place for")


@dataclass
class Source:
    """kind: the name of fairseq's model. args: its settings. weights: see Weights. task: the settings of its task."""

    kind: str
    args: argparse.Namespace
    weights: Weights
    task: Dict[str, Any]

    @property
    def router(self) -> str:
        """Its --router; `dense` for fairseq's own models."""
        return getattr(self.args, "router", DENSE)


def read_source(path: str) -> Source:
    """The checkpoint `path`. Raises ConfigurationError for one that cannot be exported, whatever its target."""
    state = read_checkpoint(path)
    with one_sentence_for(path):
        refuse_one_of_several(state)
    refuse_adapters(state)
    cfg = state.get("cfg") or {}
    settings = _plain(cfg.get("model") or state.get("args") or {})
    arch = settings.get("arch") or settings.get("_name")
    kind = ARCH_MODEL_NAME_REGISTRY.get(arch, arch)
    if kind not in MODEL_REGISTRY:
        raise ConfigurationError(f"the checkpoint is of the model {arch}, which this fairseq does not have")
    args = argparse.Namespace(**settings)
    if arch in ARCH_CONFIG_REGISTRY:
        ARCH_CONFIG_REGISTRY[arch](args)
    if str(kind).endswith("_moe"):
        fill_defaults(args, MoEOptions)
    weights = without_copies(state["model"])
    return Source(str(kind), args, Weights(weights), _plain(cfg.get("task") or getattr(state.get("args"), "__dict__", {})))


def _plain(settings: Any) -> Dict[str, Any]:
    """Settings as a dictionary, of which nothing belongs to the checkpoint."""
    if isinstance(settings, DictConfig):
        settings = OmegaConf.to_container(settings, resolve=True)
    return copy.deepcopy(as_dict(settings))


def refuse(flag: str, value: Any, model: str, why: str) -> ConfigurationError:
    """The error for a setting that the model of transformers does not have."""
    given = "" if value is True else f" {value}"
    return ConfigurationError(f"--{flag.replace('_', '-')}{given} does not fit {model} of transformers, {why}")


ACTIVATIONS = {  # fairseq's -> transformers'
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_new",
    "gelu_fast": "gelu_new",
    "tanh": "tanh",
    "linear": "linear",
}


def activation(args: Any, model: str) -> str:
    """transformers' name of --activation-fn. Raises ConfigurationError."""
    given = str(args.activation_fn)
    if given not in ACTIVATIONS:
        raise refuse("activation_fn", given, model, f"which has {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[given]


def dtype_name(tensor: Tensor) -> str:
    """float32 and the like."""
    return str(tensor.dtype).replace("torch.", "")


def same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same, as tied ones do."""
    return first.shape == second.shape and (first.data_ptr() == second.data_ptr() or torch.equal(first, second))
