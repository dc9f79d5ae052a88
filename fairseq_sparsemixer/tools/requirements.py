"""Which packages are installed, which distribution one comes from, and which extra of ours brings it."""

from importlib import metadata
from typing import List, Optional

EXTRAS = {  # by import package, the extra in setup.py
    "fairseq": "fairseq",
    "fairseq_cli": "fairseq",
    "matplotlib": "tools",
    "sacrebleu": "tools",
    "sentencepiece": "tools",
    "shtab": "tools",
    "tabulate": "tools",
}


def remedy_for(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "fairseq-sparsemixer[{extra}]"'


def without(missing: ModuleNotFoundError, what: str) -> Optional[str]:
    """The sentence for a command that stopped at an import: what it needs and how to get it. None: no package of an extra."""
    package = (missing.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{what} needs {package}, which is not installed; {remedy_for(EXTRAS[package])}"


def version(distribution: str) -> Optional[str]:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def providers(package: str) -> List[str]:
    """ "name version" of each installed distribution that has the import package, in the order of their names."""
    found = set()
    for distribution in metadata.distributions():
        if _has(distribution, package):
            found.add(f"{distribution.metadata['Name']} {distribution.version}")
    return sorted(found)


def _has(distribution: metadata.Distribution, package: str) -> bool:
    listed = distribution.read_text("top_level.txt")  # of setuptools; an editable installation has it, too
    if listed is not None:
        return package in listed.split()
    return any(path.parts[0] == package for path in distribution.files or ())
