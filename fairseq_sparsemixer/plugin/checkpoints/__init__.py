"""Checkpoints: atomic writes, reads that run no code, resharding, conversion and upcycling."""

from fairseq_sparsemixer.plugin.checkpoints.reading import allow_fairseq_checkpoints, read_checkpoint
from fairseq_sparsemixer.plugin.checkpoints.writing import replace_atomically, save_atomically

__all__ = ["allow_fairseq_checkpoints", "read_checkpoint", "replace_atomically", "save_atomically"]
