"""Checkpoints: written atomically, read without running code, moved between numbers of ranks and numbers of experts."""

from fairseq_sparsemixer.checkpoints.reading import allow_fairseq_checkpoints, read_checkpoint
from fairseq_sparsemixer.checkpoints.writing import replace_atomically, save_atomically

__all__ = ["allow_fairseq_checkpoints", "install", "read_checkpoint", "replace_atomically", "save_atomically"]


def install() -> None:
    """Make fairseq read and write its checkpoints by this package, whatever the model."""
    from fairseq_sparsemixer.checkpoints import folder_lock, reading, writing

    allow_fairseq_checkpoints()
    reading.install()
    writing.install()
    folder_lock.install()
