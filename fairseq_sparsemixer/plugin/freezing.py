"""--freeze: parameters that are not trained. Set once, after experts are sharded and before the optimizer is built."""

import logging
import re
from difflib import get_close_matches
from itertools import chain
from typing import Any, Dict, Iterable, List, Optional, Sequence, Set

import torch
from omegaconf import open_dict
from torch import Tensor, nn

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates.step_state import StepState
from fairseq_sparsemixer.names import ADAPTERS, PYTORCH_DDP
from fairseq_sparsemixer.options import moe_option
from fairseq_sparsemixer.plugin.checkpoints.model_settings import model_settings

logger = logging.getLogger(__name__)

SEPARATOR = re.compile(r",(?![^{]*\})")  # names have no commas, so one outside a repetition {m,n} ends a pattern
NEAR = 3  # names in an error
ONLY_WEIGHTS = "load only the weights with --finetune-from-model, or by --reset-optimizer --reset-lr-scheduler --reset-meters"


def patterns(freeze: str) -> List["re.Pattern[str]"]:
    """The regular expressions of --freeze. Raises ConfigurationError for an empty or invalid one."""
    found = []
    for text in SEPARATOR.split(freeze):
        if not text:
            raise ConfigurationError(f"--freeze '{freeze}' has an empty pattern; give a part of a parameter's name")
        try:
            found.append(re.compile(text))
        except re.error as error:
            raise ConfigurationError(
                f"--freeze {text} is not a regular expression ({error}); escape special characters"
            ) from None
    return found


def freeze(cfg: Any, model: nn.Module) -> None:
    """Exclude the parameters that --freeze names from training, and stop the states of gates that it names.

    A shared parameter has several names, of which any will do. Raises ConfigurationError for a pattern that matches no
    parameter, if nothing is left to train, and for fully sharded data parallelism, which joins parameters.
    """
    given = moe_option(cfg.model, "freeze")
    if given is None:
        return
    if cfg.distributed_training.ddp_backend == "fully_sharded":
        raise ConfigurationError(
            f"--freeze {given} needs single parameters, which --ddp-backend fully_sharded joins; use legacy_ddp or pytorch_ddp"
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    states = {name: state for name, state in model.named_modules() if isinstance(state, StepState)}
    for pattern in patterns(given):
        if not any(pattern.search(name) for name in chain(named, states)):
            raise ConfigurationError(
                f"--freeze {pattern.pattern} matches no parameter; there are {_near(pattern.pattern, named)}"
            )
    for name in _matching(named, given):
        named[name].requires_grad_(False)
    for name in _matching(states, given):
        states[name].frozen = True
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        raise ConfigurationError(f"--freeze {given} matches every parameter, so nothing is left to train; match fewer")
    logger.info(
        "--freeze: %d of %d parameter tensors are trained (%s of %s numbers)",
        len(trained), len(parameters), f"{_count(trained):,}", f"{_count(parameters):,}",
    )  # fmt: skip
    _reduce_nothing(cfg, trained)
    _start_graphs(model)


def _matching(names: Iterable[str], given: Optional[str]) -> List[str]:
    return [name for name in names if given and any(pattern.search(name) for pattern in patterns(given))]


def _near(pattern: str, named: Iterable[str]) -> str:
    """Names of parameters with parts that resemble the pattern's words; the first ones if there are none."""
    names = list(named)
    parts = {part for name in names for part in name.split(".")}
    words = re.findall(r"[a-z]\w*", re.sub(r"\\.", " ", pattern))
    close = {part for word in words for part in get_close_matches(word, sorted(parts))}
    near = [name for name in names if close & set(name.split("."))]
    return ", ".join((near or names)[:NEAR])


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _reduce_nothing(cfg: Any, trained: Sequence[Tensor]) -> None:
    """torch's DistributedDataParallel refuses a model with nothing to reduce: one whose only trained parameters are experts."""
    if cfg.distributed_training.ddp_backend in PYTORCH_DDP and all(hasattr(p, "expert") for p in trained):
        logger.info("--freeze: setting --ddp-backend legacy_ddp, as only experts are trained, and pytorch_ddp reduces none")
        with open_dict(cfg):
            cfg.distributed_training.ddp_backend = "legacy_ddp"


def _start_graphs(model: nn.Module) -> None:
    """Let layers under fairseq's activation checkpointing train even if nothing before them does.

    Their backward is that of an autograd function, which runs only if an input requires a gradient.
    """
    for module in model.modules():
        if hasattr(module, "precheckpoint_forward") and any(parameter.requires_grad for parameter in module.parameters()):
            module.register_forward_pre_hook(_require_gradient)


def _require_gradient(module: nn.Module, inputs: Any) -> Any:
    tensors = [value for value in inputs if torch.is_tensor(value)]
    if not torch.is_grad_enabled() or any(tensor.requires_grad for tensor in tensors):
        return None
    first, *rest = inputs
    return (first.detach().requires_grad_(), *rest)


def refuse_other_optimizer_state(state: Dict[str, Any], filename: str, model: nn.Module, given: Optional[str]) -> None:
    """Raise ConfigurationError if a checkpoint's optimizer state is that of other parameters: another --freeze, no adapters.

    given: the run's own.
    """
    if not state.get("last_optimizer_state"):
        return
    adapters = any(ADAPTERS in name for name in state["model"]), any(ADAPTERS in name for name, _ in model.named_parameters())
    if adapters == (False, True):
        raise ConfigurationError(
            f"{filename} was trained without --expert-lora-rank, so its optimizer state is for other parameters; {ONLY_WEIGHTS}"
        )
    theirs = model_settings(state).get("freeze")
    if theirs == given or _frozen(model, theirs) == _frozen(model, given):
        return
    by_it, own = (f"with --freeze {value}" if value else "without --freeze" for value in (theirs, given))
    raise ConfigurationError(
        f"{filename} was trained {by_it} and this run is {own}, so the optimizer state is for other parameters; {ONLY_WEIGHTS}"
    )


def _frozen(model: nn.Module, given: Optional[str]) -> Set[int]:
    named = dict(model.named_parameters(remove_duplicate=False))
    return {id(named[name]) for name in _matching(named, given)}
