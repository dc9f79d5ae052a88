"""Checkpoints: written atomically, read without running code, moved between numbers of ranks and numbers of experts."""

from fairseq_sparsemixer.plugin.checkpoints.reading import allow_fairseq_checkpoints, read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.writing import replace_atomically, save_atomically

__all__ = ["allow_fairseq_checkpoints", "read_checkpoint", "replace_atomically", "save_atomically"]
