"""Which packages are installed, which distribution provides one, and which of our extras installs it."""

from importlib import metadata
from typing import List, Optional

EXTRAS = {  # package -> extra in setup.py
    "fairseq": "fairseq",
    "fairseq_cli": "fairseq",
    "matplotlib": "tools",
    "sacrebleu": "tools",
    "safetensors": "hf",
    "sentencepiece": "tools",
    "shtab": "tools",
    "tabulate": "tools",
}


def remedy_for(extra: str) -> str:
    """The command that installs an extra."""
    return f'pip install "fairseq-sparsemixer[{extra}]"'


def without(missing: ModuleNotFoundError, what: str) -> Optional[str]:
    """The error for a command that could not import a package: what it needs, and how to install it. None if not in an extra."""
    package = (missing.name or "").partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{what} needs {package}, which is not installed; {remedy_for(EXTRAS[package])}"


def version(distribution: str) -> Optional[str]:
    """The installed version; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def providers(package: str) -> List[str]:
    """ "name version" of each installed distribution that provides the package, sorted by name."""
    found = set()
    for distribution in metadata.distributions():
        if _has(distribution, package):
            found.add(f"{distribution.metadata['Name']} {distribution.version}")
    return sorted(found)


def _has(distribution: metadata.Distribution, package: str) -> bool:
    listed = distribution.read_text("top_level.txt")  # written by setuptools, also for an editable installation
    if listed is not None:
        return package in listed.split()
    return any(path.parts[0] == package for path in distribution.files or ())
