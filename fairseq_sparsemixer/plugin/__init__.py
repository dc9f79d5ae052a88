"""The fairseq integration: models, checkpoints, the trainer, and every patch to fairseq itself (patches.py)."""

from fairseq_sparsemixer.plugin.root_logger import root_logger_untouched

with root_logger_untouched():
    import fairseq  # noqa: F401  registers everything (see the package's __init__) before any module here is partly loaded
