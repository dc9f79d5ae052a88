"""Reads a study's file and merges it with the study that it builds on.

base: study.yaml                # relative to this file; may have a base itself
flags: {max-update: 600}        # mappings are merged, key by key; lists and plain values replace the base's
variants: {gshard-top2: null}   # null removes a key of the base
"""

import os
from pathlib import Path
from typing import Any, Dict, Tuple

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.tools.study.yaml_file import BadYaml, read_yaml

BASE = "base"
VARIANTS, ROUTERS = "variants", "routers"  # two names for the same key
PATHS, TEST_FILES = ("data", "user-dir"), ("reference", "languages")  # keys of a study and of its `test`
SHOWN = 100  # characters of a value in a message


def read_spec_file(path: Path) -> Dict[str, Any]:
    """The keys and values of a study, including those of its base; paths in a base are made absolute.

    Raises ConfigurationError, naming the file, if it or its base cannot be read.
    """
    return _read(path, ())


def require(path: Path, condition: Any, complaint: str) -> None:
    """Unless the condition holds, raise ConfigurationError with a sentence that names the file and ends in the complaint."""
    if not condition:
        raise ConfigurationError(f"the study {shown(path, 300)} {complaint}")


def shown(value: Any, longest: int = SHOWN) -> str:
    """A value for a message, shortened if it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= longest else text[:longest] + "..."


def variants_key(content: Dict[str, Any]) -> str:
    """The key of the variants in a file."""
    return ROUTERS if ROUTERS in content else VARIANTS


def merged(base: Dict[str, Any], heir: Dict[str, Any]) -> Dict[str, Any]:
    """The base's values, replaced by the heir's: mappings key by key, everything else whole; None removes a key."""
    result = dict(base)
    for key, value in heir.items():
        if key in base and value is None:
            del result[key]
        elif isinstance(base.get(key), dict) and isinstance(value, dict):
            result[key] = merged(base[key], value)
        else:
            result[key] = value
    return result


def _read(path: Path, heirs: Tuple[str, ...]) -> Dict[str, Any]:
    """heirs: the real paths of the files that build on this one."""
    content = _content(path)
    both = ROUTERS in content and VARIANTS in content
    require(path, not both, f"has {ROUTERS} and {VARIANTS}, two names for the same key; use {VARIANTS} only")
    if BASE not in content:
        return content
    base_path = _base_path(path, content.pop(BASE), (*heirs, os.path.realpath(path)))
    base = _absolute(base_path, _read(base_path, (*heirs, os.path.realpath(path))))
    if variants_key(base) in base and (ROUTERS in content or VARIANTS in content):
        base[variants_key(content)] = base.pop(variants_key(base))
    return merged(base, content)


def _base_path(path: Path, value: Any, heirs: Tuple[str, ...]) -> Path:
    good = isinstance(value, str) and value and "\0" not in value
    require(path, good, f"has {BASE}: {shown(value)}; give the path of the study that it builds on")
    base = Path(os.path.realpath(path.parent / value))
    there = f"and there is no file {shown(base)}; give the path of a study, relative to this file"
    require(path, os.path.isfile(base), f"has {BASE}: {shown(value)}, {there}")
    circle = f"has {BASE}: {shown(value)}, which builds on this file itself; remove {BASE} from one of them"
    require(path, str(base) not in heirs, circle)
    return base


def _absolute(path: Path, content: Dict[str, Any]) -> Dict[str, Any]:
    """The same study with absolute paths."""

    def beside(value: Any) -> Any:
        return os.path.join(os.path.realpath(path.parent), value) if isinstance(value, str) and value.strip() else value

    content = {**content, **{key: beside(content[key]) for key in PATHS if key in content}}
    if isinstance(content.get("test"), dict):
        files = {key: beside(content["test"][key]) for key in TEST_FILES if key in content["test"]}
        content["test"] = {**content["test"], **files}
    return content


def _content(path: Path) -> Dict[str, Any]:
    try:
        content = read_yaml(path)
    except BadYaml as error:
        raise ConfigurationError(f"the study {shown(path)} {error}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"the study {shown(path)} cannot be read ({reason})") from None
    require(path, isinstance(content, dict), "is not a mapping of keys to values")
    return dict(content)
