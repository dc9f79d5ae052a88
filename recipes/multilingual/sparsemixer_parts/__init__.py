"""A user-dir with `--router sparsemixer_parts`: every part of SparseMixer as an option, for the study that takes it apart."""

import sparsemixer_parts.gate  # noqa: F401
