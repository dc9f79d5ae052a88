"""All that `--user-dir` stands for: models and criterions by name, and the patches."""

from fairseq_sparsemixer import criterions  # noqa: F401
from fairseq_sparsemixer.plugin import models, patches  # noqa: F401


def register() -> None:
    """Apply the patches; models and criterions register themselves when they are imported."""
    patches.apply()
