"""The settings of a checkpoint's model, which fairseq writes in several forms."""

import argparse
from typing import Any, Dict


def as_dict(settings: Any) -> Dict[str, Any]:
    """A copy of settings, which fairseq writes as a dictionary or a Namespace, as a dictionary."""
    return dict(vars(settings) if isinstance(settings, argparse.Namespace) else settings)


def in_form_of(settings: Any, values: Dict[str, Any]) -> Any:
    """The values as a dictionary or a Namespace, whichever `settings` is."""
    return argparse.Namespace(**values) if isinstance(settings, argparse.Namespace) else values


def model_settings(state: Dict[str, Any]) -> Dict[str, Any]:
    """The settings of a checkpoint's model by name, as new and old fairseq write them; empty if there are none."""
    settings: Any = state.get("args") or (state.get("cfg") or {}).get("model") or {}
    return as_dict(settings)
