"""Writes an export: a folder that is complete or not there, its weights in files of limited size.

Tensors are made when their file is written, so memory is that of one file.
"""

import json
import os
from pathlib import Path
from typing import Any, Dict, List

from fairseq_sparsemixer.errors import ConfigurationError
from fairseq_sparsemixer.files import finish_folder, unfinished_folder_beside
from fairseq_sparsemixer.plugin.checkpoints.writing import cannot_write
from fairseq_sparsemixer.tools.export.source import Export, Lazy

GB = 10**9
INDEX = "model.safetensors.index.json"
WRITTEN = ("config.json", "generation_config.json", "model*.safetensors", INDEX)
TOKENIZER = ("tokenizer_config.json", "vocab.json", "target_vocab.json", "source.spm", "target.spm")


def require_folder(folder: Path, overwrite: bool) -> None:
    """Raise ConfigurationError, before any work is done, unless the folder can be written.

    An existing one must be empty or, with overwrite, hold only what an export writes.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder; name a new one")
    if not folder.exists() and not folder.absolute().parent.is_dir():
        raise ConfigurationError(
            f"{folder} cannot be made, as the folder {folder.absolute().parent} does not exist; create it first"
        )
    there = sorted(folder.iterdir()) if folder.exists() else []
    if there and not overwrite:
        raise ConfigurationError(f"{folder} is not empty; name a new folder, or replace this one's export with --overwrite")
    for path in there:
        if not any(path.match(name) for name in (*WRITTEN, *TOKENIZER)):
            raise ConfigurationError(f"{folder} also has {path.name}, which --overwrite would remove; name a new folder")


def write_folder(folder: Path, export: Export, tokenizer: Dict[str, bytes], max_file_size: int) -> List[str]:
    """Write the files of an export, and return the names of those with weights. Raises ConfigurationError.

    max_file_size: bytes of tensors in a file; a single larger tensor has a file of its own.
    """
    from safetensors.torch import save_file

    shards = _shards(export.tensors, max_file_size)
    single = len(shards) == 1
    names = [
        "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    contents = {"config.json": _json(export.config), "generation_config.json": _json(export.generation), **tokenizer}
    if not single:
        placed = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(lazy.size for lazy in export.tensors.values())
        contents[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": placed})
    try:
        with unfinished_folder_beside(folder) as unfinished:
            for name, shard in zip(names, shards):
                made = {tensor: lazy.make() for tensor, lazy in shard.items()}
                save_file(made, os.path.join(unfinished, name), metadata={"format": "pt"})
                del made
            for name, content in contents.items():
                Path(unfinished, name).write_bytes(content)
            finish_folder(unfinished, folder)
    except OSError as error:
        raise cannot_write(str(folder), error) from None
    return names


def _shards(tensors: Dict[str, Lazy], max_size: int) -> List[Dict[str, Lazy]]:
    """The tensors in order, in as few files as their order allows."""
    shards: List[Dict[str, Lazy]] = [{}]
    size = 0
    for name, lazy in tensors.items():
        if shards[-1] and size + lazy.size > max_size:
            shards.append({})
            size = 0
        shards[-1][name] = lazy
        size += lazy.size
    return shards


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
