"""Reads the values of a study's file, or refuses them in one sentence with the file, the key, the value and a remedy."""

import os
import re
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Callable, Collection, Dict, List

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.moe.gates import DENSE, gate_class
from fairseq_sparsemixer.options import in_flags
from fairseq_sparsemixer.tools.study.spec_file import require, shown

LARGEST = 2**32 - 1  # numpy's largest seed
LONGEST_NAME = 100  # characters of a folder's name
FLAG = re.compile(r"[A-Za-z0-9][\w-]*")
SMUGGLED = re.compile(r"-(?![\d.]|$)|--")  # the beginning of a value that argparse reads as a flag
NEEDED_OFF = ("disable-validation", "no-save")
VALID = "valid"  # the split whose losses are read
OURS = (
    *("data", "save-dir", "seed", "num-experts", "log-file", "log-format", "user-dir", "moe-load-file"),
    *("restore-file", "checkpoint-suffix"),
)


def check_keys(path: Path, key: str, content: Dict[str, Any], known: Collection[str], optional: Collection[str]) -> None:
    """Refuse an unknown or a missing key of a mapping. key: of the mapping itself; empty for the file."""
    where = f"{key}: " if key else ""
    unknown = next((name for name in sorted(content) if name not in known), None)
    if unknown is not None:
        close = get_close_matches(unknown, sorted(known), n=1)
        remedy = f"the closest known key is {close[0]}" if close else f"known are {listed(known)}"
        require(path, False, f"has {where}{shown(unknown)}: {shown(content[unknown])}, an unknown key; {remedy}")
    missing = sorted(set(known) - set(content) - set(optional))
    require(path, not missing, f"lacks the key {where}{missing[0] if missing else ''}; add it")


def is_name(name: str) -> bool:
    """Whether it can be a folder's name, or the beginning of one."""
    whole = Path(name).name == name == name.strip() and name not in (".", "..")
    return whole and len(name) <= LONGEST_NAME and name.isprintable()


def as_text(path: Path, key: str, value: Any) -> str:
    """Text in one line, or a number, or a date."""
    good = isinstance(value, (str, int, float, date)) and not isinstance(value, bool) and str(value).strip()
    require(path, good, f"has {key}: {shown(value)}; give a text")
    return " ".join(str(value).split())


def as_path(path: Path, key: str, value: Any) -> Path:
    """A path relative to the spec."""
    good = isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip()
    require(path, good and "\0" not in str(value), f"has {key}: {shown(value)}; give a path")
    return Path(os.path.realpath(path.parent / str(value)))


def as_file(path: Path, key: str, value: Any) -> Path:
    """The path of an existing file, relative to the spec."""
    file = as_path(path, key, value)
    there = f"and there is no file {shown(file)}; give a path, relative to this file"
    require(path, is_there(Path.is_file, file), f"has {key}: {shown(value)}, {there}")
    return file


def is_there(test: Callable[[Path], bool], path: Path) -> bool:
    """test(path), such as Path.is_file; False for a path that no file can have."""
    try:
        return test(path)
    except (OSError, ValueError):
        return False


def as_mapping(path: Path, key: str, value: Any) -> Dict[str, Any]:
    good = value is None or isinstance(value, dict)
    require(path, good, f"has {key}: {shown(value)}; give keys with values, as in key: value")
    other = next((name for name in value or {} if not isinstance(name, str)), None)
    require(path, other is None, f"has {key}: {shown(other)}, a key that is not text; put it in quotes")
    return dict(value or {})


def as_values(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    """Flags whose values can be given on a command line."""
    flags = as_mapping(path, key, flags)
    for name, value in flags.items():
        require(
            path,
            FLAG.fullmatch(name),
            f"has {key}: {shown(name)}, which is not the name of a flag; give the name without dashes and without a value",
        )
        several = isinstance(value, list) and bool(value)
        parts = value if several else [value]
        good = all(isinstance(part, (str, int, float)) for part in parts) or value is None
        require(path, good, f"has {key}: {name}: {shown(value)}; give a value, or a list of values")
        good = not any(part != part for part in parts)
        require(path, good, f"has {key}: {name}: {shown(value)}; give a number")
        good = not any(isinstance(part, str) and ("\0" in part or SMUGGLED.match(part)) for part in parts)
        require(path, good, f"has {key}: {name}: {shown(value)}, which would be read as a flag; give a value")
    return flags


def as_flags(path: Path, key: str, flags: Any) -> Dict[str, Any]:
    flags = as_values(path, key, flags)
    if "router" in flags:
        _check_router(path, key, flags["router"])
    taken = set(flags) & set(OURS)
    require(path, not taken, f"has {key}: {first(taken)}, which the study sets itself; remove it")
    for name in flags:
        whole = next((ours for ours in OURS if ours.startswith(name)), None)
        require(path, whole is None, f"has {key}: {name}, which is short for {whole}, which the study sets itself; remove it")
    for flag in NEEDED_OFF:
        require(
            path, not flags.get(flag), f"has {key}: {flag}, but a study needs validation losses and best checkpoints; remove it"
        )
    splits = str(flags.get("valid-subset", VALID))
    good = VALID in splits.split(",")
    needed = f"but a study reads the losses of {VALID}; add it, or remove the flag"
    require(path, good, f"has {key}: valid-subset: {shown(splits)}, {needed}")
    return flags


def _check_router(path: Path, key: str, router: Any) -> None:
    try:
        if router != DENSE:
            with in_flags():
                gate_class(str(router))
    except ConfigurationError as error:
        raise ConfigurationError(f"the study {shown(path)} has {key}: {error.message}") from None


def is_seed(value: Any) -> bool:
    """Whether it is a positive integer, and not too large for a seed."""
    return type(value) is int and 0 < value <= LARGEST


def as_integers(path: Path, key: str, values: Any) -> List[int]:
    good = isinstance(values, list) and values and all(map(is_seed, values))
    require(path, good, f"has {key}: {shown(values)}; give a list of positive integers")
    require(path, len(values) == len(set(values)), f"has {key}: {shown(values)}; give each number once")
    return values


def first(names: Any) -> str:
    return shown(next(iter(sorted(map(str, names))), ""))


def listed(names: Any) -> str:
    return ", ".join(sorted(names))
