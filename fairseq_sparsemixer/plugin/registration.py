"""What `--user-dir` does: register models and criterions by name, and apply the patches."""

from fairseq_sparsemixer import criterions  # noqa: F401
from fairseq_sparsemixer.plugin import models, patches  # noqa: F401


def register() -> None:
    """Apply the patches; models and criterions are registered on import."""
    patches.apply()
