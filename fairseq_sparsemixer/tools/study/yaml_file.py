"""YAML files that people write: small, each key once, and no more than they look like."""

from pathlib import Path
from typing import Any

import yaml

LARGEST = 1 << 20  # bytes
NODES = 20_000  # values, those behind aliases counted wherever they are used
DEPTH = 50
MERGE = "<<"  # the key that takes over those of another mapping


class BadYaml(ValueError):
    """What a file has that cannot be used: the end of a sentence that begins with its name."""


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != MERGE:
                raise BadYaml(f"has the key {key.value} twice, in line {key.start_mark.line + 1} again; give it once")
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """What the file holds. Raises BadYaml, OSError or UnicodeDecodeError."""
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
    except (ValueError, TypeError) as error:  # a date that is none, a number too long
        if isinstance(error, (BadYaml, UnicodeDecodeError)):
            raise
        raise BadYaml(f"holds a value that cannot be read ({error})") from None


def _measure(root: yaml.Node) -> None:
    """Refuse what is deep, or large once aliases are followed: a few lines can stand for billions of values."""
    count, waiting = 0, [(root, 1)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > DEPTH:
            raise BadYaml(f"is more than {DEPTH} levels deep; give keys and values")
        if count > NODES:
            raise BadYaml(f"stands for more than {NODES:,} values; write them out, without aliases")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]
