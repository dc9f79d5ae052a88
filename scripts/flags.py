#!/usr/bin/env python3
"""Write the flag table in docs/flags.md from the dataclasses that define the flags: `python scripts/flags.py`."""

import sys
from dataclasses import MISSING, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flags.md"
START, END = "<!-- flags: made by scripts/flags.py -->\n", "<!-- end of flags -->"


def table() -> str:
    """The model flags, then those of the criterion and of traces, as a Markdown table."""
    from fairseq_sparsemixer.criterions.auxiliary_losses import AuxiliaryLossConfig

    from fairseq_sparsemixer.options import TraceOptions
    from fairseq_sparsemixer.plugin.models import MoEOptions, TransformerMoEConfig
    from fairseq_sparsemixer.tools.tables import markdown_table

    encoder_only = (option for option in fields(TransformerMoEConfig) if option.name == "moe_encoder_only")
    criterion = (option for option in fields(AuxiliaryLossConfig) if option.name != "_name")
    own = [*fields(MoEOptions), *encoder_only, *criterion, *fields(TraceOptions)]
    rows = [[f"`--{option.name.replace('_', '-')}`", _default(option), _help(option)] for option in own]
    return markdown_table(["flag", "default", "what it does"], rows) + "\n"


def _default(option) -> str:
    value = option.default if option.default is not MISSING else option.default_factory()
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"`{value}`"


def _help(option) -> str:
    return option.metadata["help"].replace("|", "\\|")


def updated(text: str) -> str:
    """The page's text with an up-to-date table."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


def without_table(text: str) -> str:
    """The page's text without the table: the hand-written part."""
    before, rest = text.split(START)
    return before + rest.split(END)[1]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
