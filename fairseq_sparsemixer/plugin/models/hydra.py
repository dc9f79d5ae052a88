"""Checks a model's option names under fairseq-hydra-train, which passes them from the YAML unchecked.

fairseq checks them only for models registered with a dataclass, which cannot have architectures (`--arch`).
"""

from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from typing import Any, Callable

from fairseq.models import BaseFairseqModel
from omegaconf import DictConfig

from fairseq_sparsemixer.errors import ConfigurationError


def check_option_names(options: Any, model: BaseFairseqModel, architecture: Callable[[Any], None]) -> None:
    """Raise ConfigurationError for a name in a hydra config that is neither a flag of the model nor set by its architecture."""
    if not isinstance(options, DictConfig):  # argparse has already checked command-line flags
        return
    parser, filled = ArgumentParser(add_help=False), Namespace()
    model.add_args(parser)
    architecture(filled)
    known = {action.dest for action in parser._actions} | set(vars(filled)) | {"_name", "base_layers"}
    for name in map(str, options):
        if name not in known:
            close = get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean {close[0]}?" if close else "options are named like fairseq-train's flags"
            raise ConfigurationError(f"model.{name} is not an option of {options.get('_name')}; {remedy}")
