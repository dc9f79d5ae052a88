"""Keeps a checkpoint's settings from running code: fairseq evaluates some of them as Python expressions.

In every fairseq module, `eval` is replaced by `literal`. In addition, a file with anything but literals in the settings
that fairseq evaluates is refused on reading, with an error that names it.
"""

import argparse
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any, Callable, Iterator, Optional, Set, Tuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.literals import literal

SETTINGS = ("cfg", "args")  # the entries of a checkpoint that hold them, in current fairseq and in fairseq < 0.10
# Settings that fairseq evaluates. encoder_layers is a number for a transformer, a list of convolutions for fconv.
EVALUATED = frozenset(
    "adafactor_eps adam_betas adamax_betas lamb_betas adaptive_input_cutoff adaptive_softmax_cutoff character_filters"
    " conv_aggregator_layers conv_feature_layers feature_encoder_spec encoder_layers decoder_layers encoder_attention"
    " decoder_attention self_attention selfattention project_input gated_attention downsample pretrained wer_args"
    " left_pad_source left_pad_target xformers_att_config pipeline_balance pipeline_devices"
    " pipeline_encoder_balance pipeline_encoder_devices pipeline_decoder_balance pipeline_decoder_devices".split()
)


def refuse_code(path: str, state: Any) -> None:
    """Raise ConfigurationError if an evaluated setting of a checkpoint is more than a literal."""
    for name, value in _settings([state.get(key) for key in SETTINGS] if isinstance(state, dict) else [], set()):
        if name in EVALUATED and isinstance(value, str) and value.strip():
            try:
                literal(value)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"{path} has code in its settings: {name} = {error.message}, or use a checkpoint that you trust"
                ) from None


def _settings(holder: Any, seen: Set[int]) -> Iterator[Tuple[Any, Any]]:
    """All (name, value) pairs in nested dictionaries, lists and namespaces."""
    if isinstance(holder, (DictConfig, ListConfig)):
        holder = OmegaConf.to_container(holder, resolve=False)
    if isinstance(holder, argparse.Namespace):
        holder = vars(holder)
    if not isinstance(holder, (dict, list, tuple)) or id(holder) in seen:
        return
    seen.add(id(holder))  # a pickle may contain itself
    for name, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield name, value
        yield from _settings(value, seen)


class _Guard(MetaPathFinder):
    """Finds fairseq modules as Python does, and calls `before` and `after` around their execution."""

    def __init__(self, before: Callable[[Any], None], after: Callable[[Any], None]):
        self.before, self.after = before, after

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[Any]:
        """See MetaPathFinder. Leaves everything but fairseq's Python modules to the other finders."""
        spec = PathFinder.find_spec(name, path, target) if name.startswith("fairseq.") else None
        if spec is None or not hasattr(spec.loader, "get_code") or not hasattr(spec.loader, "exec_module"):
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: Any) -> None:
            self.before(module)
            run(module)
            self.after(module)

        loader.exec_module = exec_module
        return spec


def _evaluate_literals(module: Any) -> None:
    module.eval = literal  # shadows the builtin


def install(prepare: Callable[[Any], None] = lambda module: None) -> None:
    """Make every fairseq module, including ones imported later, evaluate only literals.

    prepare: also called with each of these modules, once it is imported.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and module is not None:
            _evaluate_literals(module)
            prepare(module)
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard(_evaluate_literals, prepare))
