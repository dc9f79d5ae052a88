"""The settings in a checkpoint are data too: fairseq evaluates some of them as Python expressions, here as literals alone.

In every module of fairseq, `eval` is `literal`. And a file whose settings hold anything else where fairseq would evaluate
it is refused when it is read, with its name.
"""

import argparse
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any, Callable, Iterator, Optional, Set, Tuple

from omegaconf import DictConfig, ListConfig, OmegaConf

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.plugin.checkpoints.literals import literal

SETTINGS = ("cfg", "args")  # the entries of a checkpoint that hold them, of now and of fairseq < 0.10
# What modules of fairseq evaluate. A plain transformer's encoder_layers is a number, fconv's a list of convolutions.
EVALUATED = frozenset(
    "adafactor_eps adam_betas adamax_betas lamb_betas adaptive_input_cutoff adaptive_softmax_cutoff character_filters"
    " conv_aggregator_layers conv_feature_layers feature_encoder_spec encoder_layers decoder_layers encoder_attention"
    " decoder_attention self_attention selfattention project_input gated_attention downsample pretrained wer_args"
    " left_pad_source left_pad_target xformers_att_config pipeline_balance pipeline_devices"
    " pipeline_encoder_balance pipeline_encoder_devices pipeline_decoder_balance pipeline_decoder_devices".split()
)


def refuse_code(path: str, state: Any) -> None:
    """Raise ConfigurationError where the settings of a checkpoint hold more than a literal for fairseq to evaluate."""
    for name, value in _settings([state.get(key) for key in SETTINGS] if isinstance(state, dict) else [], set()):
        if name in EVALUATED and isinstance(value, str) and value.strip():
            try:
                literal(value)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"{path} has code in its settings: {name} = {error.message}, or use a checkpoint that you trust"
                ) from None


def _settings(holder: Any, seen: Set[int]) -> Iterator[Tuple[Any, Any]]:
    """All (name, value) in nested dictionaries, lists and namespaces."""
    if isinstance(holder, (DictConfig, ListConfig)):
        holder = OmegaConf.to_container(holder, resolve=False)
    if isinstance(holder, argparse.Namespace):
        holder = vars(holder)
    if not isinstance(holder, (dict, list, tuple)) or id(holder) in seen:
        return
    seen.add(id(holder))  # a pickle may hold itself
    for name, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
        yield name, value
        yield from _settings(value, seen)


class _Guard(MetaPathFinder):
    """Finds modules of fairseq as Python does, and prepares each before or after its code runs."""

    def __init__(self, before: Callable[[Any], None], after: Callable[[Any], None]):
        self.before, self.after = before, after

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Optional[Any]:
        """See MetaPathFinder. None, for the other finders to look, for what is not a module of fairseq in Python."""
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
    module.eval = literal  # found before the builtin one


def install(prepare: Callable[[Any], None] = lambda module: None) -> None:
    """Have every module of fairseq evaluate literals alone, those that are imported later too.

    prepare: called with each of them as well, once it is imported.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("fairseq.") and module is not None:
            _evaluate_literals(module)
            prepare(module)
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard(_evaluate_literals, prepare))
