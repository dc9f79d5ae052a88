"""Architecture functions: named sets of defaults, for command-line flags and hydra configs alike."""

import functools
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, Callable, ContextManager

from fairseq.models import register_model_architecture
from omegaconf import OmegaConf, open_dict

Architecture = Callable[[Any], None]


def register_architecture(model: str, *names: str) -> Callable[[Architecture], Architecture]:
    """fairseq's register_model_architecture, under several names, for a function that may call fairseq's own.

    Those call getattr(args, name, default), for which a hydra config of omegaconf 2.0 (used by fairseq 0.12.2) returns None.
    So they get a Namespace instead. fairseq's trainer reads base_layers in the same way.
    """

    def register(function: Architecture) -> Architecture:
        @functools.wraps(function)
        def architecture(args: Any) -> None:
            if not OmegaConf.is_config(args):
                return function(args)
            given = {key: args[key] for key in args if not OmegaConf.is_missing(args, key)}
            filled = Namespace(**{"base_layers": 0, **given})
            function(filled)
            for key, value in vars(filled).items():
                if key not in args or args[key] != value:
                    args[key] = value

        for name in names:
            register_model_architecture(model, name)(architecture)
        return architecture

    return register


def settable(args: Any) -> ContextManager[Any]:
    """A context in which settings, a Namespace or a hydra config, take values that they do not have yet."""
    return open_dict(args) if OmegaConf.is_config(args) else nullcontext()


def fill_defaults(args: Any, options: type) -> None:
    """Set the fields of the dataclass `options` that args does not have yet."""
    fill(args, **{option.name: option.default for option in fields(options)})


def fill(args: Any, **defaults: Any) -> None:
    """Set the defaults that args does not have yet."""
    for name, value in defaults.items():
        if not (name in args if OmegaConf.is_config(args) else hasattr(args, name)):
            setattr(args, name, value)
