"""YAML files written by people: small, each key once, and no larger than they look."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20  # bytes
NODES = 20_000  # values, with those of an alias counted at each use
DEPTH = 50
MERGE = "<<"  # the key that merges another mapping


class BadYaml(ValueError):
    """Why a file is refused: the end of a sentence that begins with its name."""


class _Loader(yaml.SafeLoader):
    """Plain values only, each key once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != MERGE:
                raise BadYaml(f"has the key {key.value} twice, again in line {key.start_mark.line + 1}; give it once")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The content of the file. Raises BadYaml, OSError or UnicodeDecodeError."""
    if not path.is_file():
        raise BadYaml(f"cannot be read ({'is not a file' if path.exists() else 'no such file'}); give the path of a YAML file")
    if path.stat().st_size > LARGEST:
        raise BadYaml(f"has more than {LARGEST:,} bytes; give a file of keys and values")
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        return loader.construct_document(node)
    except RecursionError:
        raise BadYaml(f"is more than {DEPTH} levels deep; give keys and values") from None
    except yaml.YAMLError as error:
        raise BadYaml(f"is not YAML ({' '.join(str(error).split())})") from None
    except (ValueError, TypeError) as error:  # an invalid date, an overlong number
        if isinstance(error, (BadYaml, UnicodeDecodeError)):
            raise
        raise BadYaml(f"has a value that cannot be read ({error})") from None


def _measure(root: yaml.Node) -> None:
    """Refuse deep nesting, and too many values once aliases are expanded: a few lines can expand to billions."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > DEPTH:
            raise BadYaml(f"is more than {DEPTH} levels deep; give keys and values")
        if count > NODES:
            raise BadYaml(f"expands to more than {NODES:,} values; write it without aliases")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
